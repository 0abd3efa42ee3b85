"""Phrasings of answers with the wanted verdict, by kind. Each line: reference|verdict|completion; ⏎ is a new line.

A verdict is right, wrong or unreadable: no answer can be read out of the completion.
"""

LETTER = r"""
B|right|B
B|right|(b)
B|right|B. red
C|right|[C]
D|right|The answer is D.
A|right|option: (A)
B|right|\boxed{B}
B|right|\text{B}
B|right|\textbf{(B)}
B|right|\mathrm{B}
B|right|**B**
B|right|__B__
B|right|$B$
B|right|\(B\)
B|right|The answer is **B**.
B|right|**Answer:** B
B|right|**Answer: B**
B|right|Answer: B. red
B|right|Answer: B) red
B|right|answer: b
B|right|ANSWER: (b)
B|right|Answer: B red
B|right|Option B
B|right|Option B.
B|right|Option B: red
B|right|option (B)
B|right|**Option B** - red
B|right|The correct answer is (B) red.
B|right|The correct answer is option B.
B|right|The correct option is B, red.
B|right|The answer is $\boxed{\text{B}}$.
C|right|I think B is wrong, the answer is C
C|right|I think B is wrong, the answer is C.
B|right|The answer is A. Wait, the answer is B.
B|right|The answer is B, not A.
B|right|The answer is B, not option A.
B|right|The answer is B and not C.
B|right|The answer is B because A is blue.
A|right|The answer is A because it is red.
A|right|The answer is A.
A|right|My answer is A!
B|right|B!
A|right|So the answer is A, since it is red
A|right|A. A cat
B|right|B - red
B|right|B is correct.
C|right|B is wrong and C is correct.
C|right|(C) is the right answer.
B|right|Not option A but option B.
B|right|B. A red cell
C|right|C. I, II and III
D|right|Therefore, I choose option D
C|right|The answer is C. Option B is wrong.
B|right|The final answer is: B
B|right|The answer to this question is (B) red.
B|right|The answer is therefore B.
B|right|The answer is "B".
B|right|The answer is 'B'.
A|right|the answer is a
C|right|Final Answer: \(\boxed{C}\)
E|right|The answer must be E.
C|right|The best choice is C
B|right|The answer is B⏎red
B|unreadable|A cat sits on the mat
B|unreadable|A cat
B|unreadable|red
B|unreadable|AB
B|unreadable|I think so
B|unreadable|the answer is Dog
B|unreadable|Neither A nor B
B|unreadable|Neither A nor B is correct.
B|unreadable|The answer is not B
B|unreadable|The answer isn't B.
B|unreadable|The answer is a cat
B|unreadable|Answer: A cat sits on the mat.
B|unreadable|Answer: I think so
B|unreadable|The answer is A or B
B|unreadable|The answer is A and B.
B|unreadable|A or B
B|unreadable|A, B
B|unreadable|(A) (B)
B|unreadable|Answer: A, B, C
B|unreadable|Answer: A/B
B|unreadable|Option B is wrong.
B|unreadable|Option B is not correct.
B|unreadable|It is not option B.
B|unreadable|I would rule out option B.
B|unreadable|Option A is a distractor, option B is blue
B|unreadable|The wrong answer is B.
B|unreadable|It is not the case that the answer is B
B|unreadable|If the answer is B, it is red.
B|unreadable|the answer is C-shaped
B|unreadable|Answer: x = 5
B|unreadable|The answer is E=mc^2
B|unreadable|The answer is neither A nor B
B|unreadable|Options: A) red B) blue
B|unreadable|option A or option B
B|unreadable|Answer: B or C
B|unreadable|Either A or B is correct.
B|unreadable|I'd say the answer
B|unreadable|The answer lies between B and C
B|unreadable|Plan B failed
B|unreadable|The answer is A?
B|unreadable|Both A and B are correct!
B|unreadable|Vitamin C
B|unreadable|Answer: B is wrong.
B|unreadable|I, for one, am lost
B|unreadable|The answer is A-
B|unreadable|a red cell
B|unreadable|The first option is A) red
B|unreadable|As option B says, red.
E|right|I choose E
B|right|Hence, B.
B|right|答案是B
B|right|答案：Ｂ
C|right|正确选项是（C）。
C|right|正确答案是：C
B|right|故选B。
C|right|因此选择 C
B|right|因此，答案为Ｂ。
B|right|选B
B|right|正解はBです
B|right|答えは(B)です。
B|right|정답은 B입니다
B|right|정답: B
B|unreadable|答案不是B
B|unreadable|答案是A还是B
B|right|B是正确的
B|unreadable|B不正确
B|right|选项B
B|unreadable|不选B
C|right|选项B不对，选C
B|unreadable|A或B
B|unreadable|A) red B) blue C) green
B|unreadable|A. red B. blue
B|unreadable|Answer: A) red B) blue C) green
B|unreadable|(A) red (B) blue
B|right|Answer: B) red, not A) blue
B|unreadable|A) It is red B) It is blue
B|right|The answer is (B) and (C) is wrong
C|right|Based on the picture, C.
B|right|The butterfly has a closed wing, so B
B|right|So B.
B|right|Therefore, the answer is option B
B|right|It's B.
B|right|It must be (b).
C|right|I'd go with C
D|right|I would pick (D) here
B|right|I'll go with B, because it is red
B|right|Let's go with B
B|unreadable|I would not choose B
B|unreadable|I wouldn't pick B.
B|unreadable|I can't choose B
B|unreadable|I don't think it's B.
B|unreadable|So A is out
B|unreadable|Not B.
B|right|**B** is right
B|right|The one on the left is **(B) red**.
B|unreadable|**A** red **B** blue
B|right|Answer - B
B|right|Answer → B
B|right|Ans: B
B|right|Ans. B
B|right|Final answer B
B|right|B is the answer
C|right|The answer is B. Wait, actually it's C.
C|right|The answer is B? No, C.
B|unreadable|everything but B
B|unreadable|None of the above
E|right|The answer should be E, none of these
B|right|(Ｂ)
B|right|Ⓑ
B|right|"B"
B|right|B)
B|right|B:
B|right|[B]
B|right|$\boxed{\mathrm{B}}$
B|right|\textbf{B}
B|right|$\textbf{B}$
B|right|~~A~~ B
B|right|The correct one is B
C|right|the best option is (c)
B|unreadable|Maybe B, maybe C
B|unreadable|B or maybe C
B|unreadable|I am torn between B and C
B|unreadable|A, C
I|right|I
A|right|A
B|unreadable|I see a cat
B|unreadable|A person
B|unreadable|Answer: A person
B|unreadable|Answer: none
B|unreadable|The answer is in B
B|right|I think it is B
B|right|I believe B is correct
B|right|option b
C|right|My guess is C.
B|right|The answer is not A but B.
B|right|Answer: B (red)
B|right|Answer:B
B|right|answer is:B
B|right|The answer is⏎B
B|right|> **Answer:** `B`
B|unreadable|Answer: (A) and (B)
B|unreadable|A and B
B|unreadable|Both A and C
B|unreadable|A/B
B|unreadable|Neither
E|right|E.
E|right|The answer would be (E)
E|right|the letter is E
C|right|So the answer is C) green
B|right|B, since it is red
B|right|B because it is red
B|unreadable|In the image, A is red, B is blue.
B|unreadable|A is larger than B.
B|unreadable|Is it A?
B|right|The answer could be B.
B|unreadable|All of the above
B|right|答案：B，因为它是红色的
B|right|答案选B
C|right|我选择C
D|right|我选（D）
B|unreadable|选项A和B
C|right|应该选C。
B|right|正确的是B
B|right|B。
B|unreadable|答案是 B 或 C
B|unreadable|这是一只猫
B|right|Bです
B|wrong|C
B|wrong|(c)
B|wrong|The answer is **C**.
B|wrong|\boxed{\text{C}}
B|wrong|I choose E
B|wrong|Hence, D.
B|wrong|答案是C
B|wrong|答案：Ｃ
B|wrong|正确选项是（A）。
B|wrong|C. red
B|wrong|Option A
B|wrong|A is correct.
B|wrong|The answer is B. Wait, actually it's C.
B|wrong|The answer is not B but A.
B|wrong|B is wrong and C is correct.
B|wrong|Not option B but option D.
B|wrong|<answer>A</answer>
B|wrong|\boxed{B} then \boxed{D}
B|wrong|<answer>B</answer> no, <answer>C</answer>
B|wrong|<think>The answer is B.</think>The answer is C.
B|right|<answer>B
B|right|<answer> B⏎
B|right|<answer>(B) red
B|right|<think>Is it A? No.</think><answer>B
B|right|<answer>\boxed{B}</answer>
B|right|<answer>The answer is B.</answer>
B|right|\boxed{B
B|right|\boxed{\textbf{(B) red}}
B|right|\boxed{\text{Option B}}
B|right|$\boxed{B}$ is my answer, not A.
B|right|\fbox{B}
B|right|\boxed B
B|right|<answer></answer>\boxed{B}
B|right|I put it in <answer> tags.⏎<answer>B</answer>
B|right|A) red B) blue C) green⏎The answer is B.
B|right|The answer is B.⏎It is on the left of the cat.
B|right|The answer is B.⏎⏎Hope this helps!
B|right|Answer:⏎B
B|right|**Answer:**⏎⏎**(B)** red
B|right|## Answer⏎B
B|right|First, A looks too small.⏎C is too big.⏎So the answer is B
B|right|A is 3 cm, B is 5 cm and C is 2 cm. Therefore, the longest is B.
B|right|<think>It might be A or C.</think>⏎B
B|right|It might be A.</think>⏎B
B|right|<think>\boxed{B}</think>
B|right|\boxed{A}⏎Wait, no: \boxed{B}
B|right|<answer> B </answer><|im_end|>
B|right|( ( <answer> B </answer>
B|right|Ｂ
B|right|（Ｂ）
B|right|<b>B</b>
(B)|right|B
Ｂ|right|B
B. red|right|B
B. red|right|red
B. red|right|The answer is red.
B. red|right|B. red
B. red|wrong|A
B. red|wrong|A. red
B. red|unreadable|blue
(B) red|right|**B**
B|unreadable|The answer is red.
B|unreadable|<answer></answer>
B|unreadable|<think>The answer is B.
B|unreadable|\boxed{}
B|unreadable|\boxed{A} or \boxed{B}
B|unreadable|\boxed{A}, \boxed{B}
B|unreadable|<answer>A or B</answer>
B|unreadable|<answer>A) red B) blue C) green</answer>
B|unreadable|I don't know.
B|unreadable|A) red⏎B) blue⏎C) green
B|unreadable|( ( ( ( (
B|unreadable|答案不是B。
B|unreadable|选项有：A. 红色 B. 蓝色 C. 绿色
B|right|The correct answer is: **B) red**
B|right|B. The red one is the closest, since A is further away.
B|right|I'd pick B.
B|right|I would say B
B|right|My final choice: (B)
B|right|It has to be B.
B|right|Choice B is correct.
B|right|Option (B) is the correct one.
B|right|the answer's B
B|right|The answer is B) red cell.
B|right|Looking at the image, I can see that the dog is on the left. So, the correct option is B.
B|right|Let me think. A is wrong. C is wrong. So it must be B.
B|right|A, C and D can be ruled out, leaving B.
B|right|We can rule out A. The answer is B.
B|right|Answer: B; the rest are wrong.
B|right|[Answer] B
B|right|**B**: red
B|right|*B*
B|right|$$\boxed{B}$$
B|right|\[\boxed{\text{(B)}}\]
B|right|Therefore, the final answer is $\boxed{\textbf{(B)}\ 12}$.
B|right|\boxed{\mathbf{B}}
B|right|\boxed{B.}
B|right|\boxed{(B)}
B|right|\boxed{B: red}
B|right|\boxed{B \text{ (red)}}
B|right|\boxed{\text{B. red}}
B|right|\boxed{Answer: B}
B|right|The answer: ⏎⏎(B)
B|right|<answer>⏎B⏎</answer>
B|right|<ANSWER>B</ANSWER>
B|right|<answer>B</answer>⏎<answer></answer>
B|right|Answer：B
B|right|答案是：（B）
B|right|答案选择B选项
B|right|所以答案是B。
B|right|综上所述，选B。
B|right|因此，正确答案为 **B**。
B|right|本题答案为B。
B|right|最终答案：\boxed{B}
B|right|故答案为：B.
B|right|我认为是B
B|right|应为B
B|right|答えはＢです
B|right|正解は「B」です。
B|right|【答案】B
B|right|正确答案是 B. 红色
B|right|選B
B|right|答案: B、因为
B|right|Ｔｈｅ　ａｎｓｗｅｒ　ｉｓ　Ｂ．
B|right|The answer is “B”.
B|right|The answer is ‘B’.
B|right|Hence B
B|right|Thus, B is the answer.
B|right|Therefore B.
B|right|In conclusion, option B.
B|right|So I choose (B) red.
B|right|I select option B.
B|right|I'm choosing B.
B|right|I am going with option B
B|right|Selecting B.
B|right|Definitely B.
B|right|Probably B.
B|right|B, definitely.
B|right|B it is.
B|right|b
B|right|(b) red
B|right|ANSWER: B
B|right|A: no. B: yes. So the answer is B.
B|right|Is it A? No. The answer is B.
B|right|I initially thought A, but the answer is B.
B|right|The answer isn't A; it's B.
B|right|It's not A, it's B.
B|right|A is incorrect. B is correct.
B|right|The answer is B and I am sure.
B|right|The answer is B or so I think.
B|right|answer=B
B|right|Answer is B
B|right|Answer B.
B|right|Answer: option B
B|right|Answer: Option (B): red
B|right|Answer: the correct one is B
B|right|Response: B
B|right|{"answer": "B"}
B|right|`{"answer": "B"}`
B|right|The choice is B
B|right|The best answer is B, red.
B|right|The object closest to the camera is option B.
B|right|The answer is letter B
B|unreadable|The answer is A/B
B|unreadable|A or B, I am not sure
B|unreadable|It could be A or B.
B|unreadable|It's either A or B.
B|unreadable|B?
B|unreadable|Is it B?
B|unreadable|Not sure, maybe A, maybe B.
B|unreadable|I don't think the answer is B.
B|unreadable|It is unlikely that the answer is B
B|unreadable|The answer cannot be B.
B|unreadable|The answer can't be B.
B|unreadable|The answer is anything but B
B|unreadable|The answer is definitely not B.
B|unreadable|B is incorrect.
B|unreadable|B is not the answer
B|unreadable|B isn't right.
B|unreadable|B can be excluded.
B|unreadable|I doubt it is B.
B|unreadable|It would be wrong to choose B.
B|unreadable|Don't choose B.
B|unreadable|never pick B
B|unreadable|Options: (A) red, (B) blue, (C) green
B|unreadable|The options are A, B and C.
B|unreadable|The choices are: A. red, B. blue.
B|unreadable|A: red, B: blue, C: green
B|unreadable|A - red⏎B - blue
B|unreadable|(A) red⏎(B) blue⏎(C) green⏎(D) white
B|unreadable|A. red B. blue C. green D. white
B|unreadable|Please choose from A, B, C or D
B|unreadable|Answer with the option's letter: A, B, C or D.
B|unreadable|The red one.
B|unreadable|2
B|unreadable|second option
B|unreadable|Both B and C.
B|unreadable|All of A, B, C
B|unreadable|neither B nor C
B|unreadable|不是B
B|unreadable|我不选B
B|unreadable|B是错误的
B|unreadable|A和B都对
B|unreadable|A、B、C
B|unreadable|Let B be the area of the triangle.
B|unreadable|Player B
B|unreadable|In option B the cat is red.
B|unreadable|Vitamin B
B|unreadable|Plan B
B|unreadable|Type B
B|wrong|The answer is C. B is wrong.
B|wrong|A. B is too small.
B|wrong|C⏎⏎Explanation: B is too small.
B|wrong|Answer: C⏎Option B is blue.
B|wrong|Answer: A⏎Reason: B is far.
B|wrong|C, not B
B|wrong|C rather than B
B|wrong|C instead of B.
B|wrong|I choose C over B.
B|wrong|The answer is B... wait, no, the answer is C.
B|wrong|It looks like B, but it is C.
B|wrong|\boxed{C} (not B)
B|wrong|<think>B</think><answer>C</answer>
B|wrong|Based on the picture, C.
B|wrong|None of A or B, the answer is E
B|wrong|E. None of the above
B|unreadable|There is no B.
B|unreadable|To choose B, we would need a red cell.
B|unreadable|First A, then B.
B|unreadable|If we choose B, the cell is red.
B|unreadable|You could choose B
B|right|I'm going to choose B.
B|right|I have chosen B
B|right|We choose B.
B|right|The image shows a red car (option B).
B|right|The red car matches option B.
B|right|This corresponds to option B.
B|right|This matches choice (B).
B|right|The correct answer is:⏎⏎B. red
B|right|The correct answer is:⏎- B. red
B|right|**The correct answer is B.**
B|right|Correct answer: B
B|right|Correct option: B
B|right|Option: B
B|right|Choice: B
B|right|Final: B
B|right|Solution: B
B|right|The answer is (B).⏎⏎(A) is too dark.
B|right|Let's analyze:⏎A. too dark⏎B. right size⏎C. too bright⏎⏎Answer: B
B|right|A. too dark⏎B. right size⏎C. too bright⏎Therefore, the answer is B. right size
B|right|A: too dark.⏎B: right.⏎So B.
B|right|B.⏎⏎Because the car is red.
B|right|B⏎The car is red.
B|right|(B) red⏎⏎The car is red, as one can see.
B|right|<think>A? B? C?</think>⏎⏎B
B|right|<think>⏎A⏎</think>⏎<answer>⏎(B)⏎</answer>
B|right|The final answer is $\boxed{B}$
B|right|\boxed{ B }
B|right|\boxed{\text{ B }}
B|right|\( \boxed{\text{B}} \)
B|right|\boxed{\text{(B) }\frac{1}{2}}
B|right|\boxed{\mathrm{(B)}\ 12}
B|right|\boxed{\textbf{B) } 12}
B|right|\boxed{B)}
B|right|\boxed{\mathbb{B}}
B|right|\boxed{\mathcal{B}}
B|right|\boxed{{B}}
B|right|\boxed{\displaystyle B}
B|right|The answer is \textbf{B}.
B|right|The answer is $B$.
B|right|<answer>B.</answer>
B|right|<answer>**B**</answer>
B|right|<answer>B: red</answer>
B|right|<answer>B, red</answer>
B|right|<answer>B - red</answer>
B|right|<answer>option B</answer>
B|right|<answer> Option: B </answer>
B|right|<answer>The correct option is B</answer>
B|right|The red one, (B).
B|right|I would answer B.
B|right|The answer must be B since A is excluded.
B|right|The answer would be B, as C is not red.
B|right|The answer is B but A is close.
B|right|The answer is B: red
B|right|The answer is B; A is wrong
B|right|Answer --> B
B|right|Answer is option (B) - red
B|right|so the answer should be option B
B|right|The correct answer is choice B.
B|right|The best match is B.
B|right|Among the options, B is the best.
B|right|Only B is correct.
B|right|A is not correct, C is not correct, only B is correct.
B|unreadable|Neither A, B nor C is correct.
B|unreadable|I can't see the picture, so I can't choose between A and B.
B|unreadable|A B C D
B|unreadable|ABCD
B|unreadable|A, B, C, D
B|unreadable|Choose one of A, B.
B|unreadable|a or b
B|unreadable|<answer>A, B</answer>
B|unreadable|<answer>A and B</answer>
B|unreadable|<answer>AB</answer>
B|unreadable|<answer>none</answer>
B|unreadable|<answer>?</answer>
B|unreadable|<answer>red</answer>
B|wrong|<answer>A. B is wrong</answer>
B|wrong|The answer is A. (B) is wrong.
B|wrong|Not B, but A.
B|wrong|The answer is C; B was my first guess.
B|wrong|At first I chose B. Now I choose C.
B|wrong|B is tempting, but the answer is C.
B|wrong|答案是C，不是B。
B|wrong|不是B，而是C
A|right|A.
A|right|The answer is A
A|right|The answer is: A
A|right|I choose A.
A|right|So, A.
A|right|A because it is red
A|right|A, since it is red
A|right|A is correct.
A|right|答案是A。
A|unreadable|A red car.
A|unreadable|The answer is a red car.
A|unreadable|There is a car
A|unreadable|A car is seen
A|unreadable|A man, a plan
I|right|The answer is I.
I|unreadable|I think so.
I|unreadable|I am sure.
"""
"""A reference of kind choice."""

TEXT = r"""
red|right|red
red|right|Red.
red|right|RED
red|right|\boxed{\text{red}}
red|right|\boxed{red}
red|right|\text{red}
red|right|\mathrm{red}
red|right|$\text{red}$
red|right|\textbf{\text{red}}
red|right|**red**
red|right|*red*
red|right|__red__
red|right|`red`
red|right|"red"
red|right|“red”
red|right|(red)
red|right|<answer>red</answer>
red|right|<answer>**red**</answer>
red|right|<answer>red
red|right|<answer>The answer is red.</answer>
red|right|The answer is red.
red|right|The answer is **red**.
red|right|The color is **red**.
red|right|**Answer:** red
red|right|**Answer: red**
red|right|Answer: red.
red|right|Answer:⏎red
red|right|Final answer: \boxed{\text{red}}.
red|right|The answer is: "red"
red|right|The answer is not blue but red.
red|right|The answer is red, not blue.
red|right|red, not blue
red|right|The answer is red because the cell is warm.
red|right|The car is red.
red|right|It's red.
red|right|So, it is red.
red|right|I think it is red.
red|right|It looks red.
red|right|B. red
red|right|(B) red
red|right|Answer: (B) red
red|right|ｒｅｄ
red|right|答案是red
red|right|答案：red。
红色|right|答案是红色。
红色|right|红色
红色|right|答案：**红色**
赤|right|答えは「赤」
red|right|The answer is red.⏎The cell on the left is warm.
red|right|<think>Maybe blue.</think>red
red|right|\boxed{blue}⏎No: \boxed{red}
red|right|~~blue~~ red
red|right|### red
red|right|- red
red|right|the red
the cat|right|cat
a cat|right|the cat
top left|right|top-left
top-left|right|Top left
light blue|right|The answer is **light-blue**.
New York|right|new  york
café|right|café
(1, 2)|right|(1,2)
(1, 2)|right|\boxed{(1,2)}
None of the above|right|None of the above.
none|right|none
not red|right|not red
red or blue|right|red or blue
unknown|right|unknown
yes|right|Yes
yes|right|Yes, the cat is on the left.
yes|right|Yes. It is.
yes|right|yes!
yes|right|The answer is yes.
yes|right|The answer is yes, because it is red.
yes|right|<answer>Yes</answer>
yes|right|**Yes**, it is.
yes|right|So yes.
no|right|No
no|right|No, it is not red.
no|right|The answer is no.
no|right|\boxed{\text{No}}
true|right|True.
true|right|The statement is true.
true|right|The answer is: True
false|right|False, since it is blue.
false|right|The statement is false.
yes|wrong|No
yes|wrong|No, yes would be too much to say.
yes|wrong|The answer is no.
no|wrong|Yes, it is.
true|wrong|The statement is false.
true|wrong|yes
false|wrong|True
red|wrong|blue
red|wrong|red cell
red|wrong|reddish
red|wrong|dark red
red|wrong|\boxed{\text{blue}}
red|wrong|**blue**
red|wrong|The answer is blue.
red|wrong|The answer is blue, not red.
red|wrong|The answer is not red but blue.
red|wrong|The **red** car is blue.
red|wrong|The red car is blue.
red|wrong|The answer is red and blue
red|wrong|<answer>blue</answer> red
red|wrong|red⏎blue
red|wrong|\boxed{red} No: \boxed{blue}
red|wrong|答案是blue
红色|wrong|答案是蓝色。
red|wrong|A. blue
red|wrong|blue, since red is too warm
red|wrong|<think>red</think>blue
left|wrong|right
top left|wrong|left
red|wrong|r e d
red|wrong|infrared
red|wrong|5
(1, 2)|wrong|(2, 1)
red|unreadable|
red|unreadable|<answer></answer>
red|unreadable|\boxed{}
red|unreadable|<think>red
red|unreadable|...
red|unreadable|I don't know.
red|unreadable|I cannot determine the color.
red|unreadable|Sorry, I can't tell.
red|unreadable|N/A
red|unreadable|unclear
red|unreadable|not red
red|unreadable|The answer is not red.
red|unreadable|It is not red.
red|unreadable|It isn't red.
red|unreadable|None of them is red.
red|unreadable|If it is red.
red|unreadable|red or blue
red|unreadable|red/blue
red|unreadable|either red or blue
red|unreadable|The answer is red or blue.
red|unreadable|The answer is red?
red|unreadable|\boxed{red} or \boxed{blue}
red|unreadable|A) red B) blue C) green
red|unreadable|The wrong answer is red.
yes|unreadable|Yes and no.
yes|unreadable|yes or no
red|unreadable|In this picture we see many cells of many colours, and red among them somewhere
red|unreadable|答案不是red
red|right|The answer is: red
red|right|Answer: **Red**.
red|right|It is **red**.
red|right|The ball is **red** in color.
red|right|The color of the ball is red.
red|right|The ball's color is red.
red|right|I would say red.
red|right|I believe the color is red.
red|right|The final answer is \boxed{\text{red}}.
red|right|\boxed{\mathrm{red}}
red|right|\boxed{\textbf{red}}
red|right|\boxed{\text{Red.}}
red|right|\boxed{"red"}
red|right|$\boxed{\text{red}}$
red|right|\text{The answer is red}
red|right|Red
red|right|red!
red|right|<answer> Red </answer>
red|right|<answer>\text{red}</answer>
red|right|<answer>**red**
red|right|So the answer is red.
red|right|Thus, the answer is "red".
red|right|Therefore, red.
red|right|red (not blue)
red|right|red, because it is warm
red|right|red - like a rose
red|right|1. red
red|right|* red
red|right|**Final Answer**: red
red|right|### Final Answer⏎red
red|right|**Final Answer**⏎⏎**red**
red|right|Color: red
red|right|The answer is the red.
red|right|_red_
red|right|***red***
red|right|答案是**red**。
red|right|答案为red
red|right|颜色是red。
left|right|It's on the left.
yes|right|yes, it does.
yes|right|Yes - the cat is there
yes|right|Yes because it is red.
yes|right|Yes it is
yes|right|The answer is "Yes".
yes|right|Answer: Yes, there is.
yes|right|I think yes.
yes|right|Indeed, yes.
no|right|No.
no|right|No, there is no cat in the picture.
no|right|No, there isn't.
no|right|Answer: No
no|right|The answer is **No**.
no|wrong|Yes, there is no doubt.
yes|wrong|no
yes|wrong|No, there are none.
yes|wrong|The answer is **No**, since yes would need a cat.
no|unreadable|It is not known.
yes|unreadable|maybe
yes|unreadable|Yes/No
True|right|true
True|right|The claim is true.
True|wrong|False
False|right|This is false.
true|unreadable|not true
false|wrong|It is true
red|wrong|green
red|wrong|The answer is green, as red is too bright.
red|wrong|Not red: blue
red|unreadable|anything but red
red|unreadable|It could be red or blue.
red|unreadable|red, or maybe blue
red|unreadable|I'm not sure.
red|unreadable|It's hard to say.
red|unreadable|I do not see any ball.
red|unreadable|Unknown
red|unreadable|?
red|unreadable|No answer
red|unreadable|The options are red, blue and green.
red|unreadable|red? blue?
red|unreadable|red, blue, green or yellow
red|wrong|red and blue
red|wrong|reds
red|wrong|the ball is not red, it is blue
None of the above|right|none of the above
None of the above|right|The answer is None of the above.
None|right|none
black and white|right|black and white
black and white|right|It is black and white.
x-axis|right|x-axis
San Francisco|right|It's San Francisco.
U.S.|right|U.S.
Dr. Smith|right|Dr. Smith
cat|right|A cat.
cat|right|an answer: cat
cat|right|There is a cat.
cat|wrong|caterpillar
cat|wrong|There is a dog.
red|right|The dominant color is red.
red|right|It appears to be red.
red|right|It appears red.
red|right|The ball is red and not blue.
red|right|The car on the left is red.
red|right|The answer to the question is red.
red|right|<answer>It is red.</answer>
red|right|My answer is red
red|right|My answer: red
red|right|The correct answer is "red".
red|right|The correct answer is: **red**
red|right|Final Answer: The ball is red.
red|right|Answer: The ball is red.
red|right|Answer: it is red
red|right|\boxed{\text{the ball is red}}
red|right|red.⏎
red|right|red,
red|right|'red'
red|right|[red]
red|right|red <|im_end|>
red|right|red</s>
red|right|<answer>"red"</answer>
red|right|The answer is ‘red’.
red|wrong|The answer is pink
red|wrong|pinkish red
red|wrong|The ball is not blue, it is green.
red|wrong|The red ball is left of the blue one.
red|wrong|red ball
red|unreadable|Neither red nor blue.
red|unreadable|It is neither red nor blue
red|unreadable|I am not sure whether it is red.
red|unreadable|It might be red or green
red|unreadable|Perhaps
red|unreadable|I cannot answer that.
red|unreadable|I'm sorry, but I can't help with that.
yes|right|Yes, I think so.
yes|right|Yes, they are both red.
yes|right|The answer is: Yes.
yes|right|<answer>yes, it is</answer>
yes|right|Yes⏎⏎The cat is left.
no|right|No, they are not.
no|right|No, the cat isn't there.
no|right|no, never
two cats|right|There are two cats.
blue and red|wrong|red and blue
5th Avenue|right|5th Avenue
12:30|right|12:30
12:30|right|It is 12:30.
12:30|wrong|12:35
2020-01-05|right|2020-01-05
STOP|right|stop
left|right|left
left|right|To the left
left|right|Left.
left|right|The left.
7:30|right|7:30
7:30|wrong|7
"""
"""A reference of kind exact."""

NUMBER = r"""
5|right|5
50%|right|50
50%|right|0.5
50%|right|1/2
50%|right|50 percent
50%|right|50 per cent
50%|wrong|5
50|right|50%
0.5|right|50%
5 cm|right|5
5 cm|right|5 cm
5 cm|right|5cm
5 cm|right|5 centimeters
5 cm|wrong|5 m
5 cm|right|50 mm
5 cm|right|0.05 m
5 cm|right|The length is 5 cm.
5 cm|wrong|The length is 5 metres.
5|right|5 cm
5|right|5 m
10|wrong|10^5
100000|right|10^5
10|wrong|10^{5}
10|wrong|10⁵
3|wrong|3x
3|wrong|3 x
5|wrong|x>5
5|wrong|x > 5
5|right|x = 5
5|right|x=5
5|right|y = x = 5
5|wrong|x \geq 5
5|wrong|x ≠ 5
5|wrong|5 < x
5|wrong|at least 5
5|wrong|more than 5
5|wrong|5 or more
5|wrong|3-5
5|wrong|3–5
5|wrong|3 to 5
5|wrong|between 3 and 5
5|wrong|from 3 to 5
5|unreadable|3 or 5
5|unreadable|either 3 or 5
5|unreadable|not 5
5|unreadable|the answer is not 5
5|unreadable|It isn't 5.
6|right|It is not 5 but 6
5|right|5, not 6
5|unreadable|5 is wrong
-5|right|-5
-5|right|−5
-5|right|minus 5
-5|right|negative 5
5|wrong|-5
-5|wrong|5
-5|right|(-5)
-5|right|x = -5
-5|right|x=-5
-5|right|= -5
5|wrong|8 - 3
5|wrong|3 + 2
7|right|3 + 4 = 7
5|right|5.0
5|right|5.
0.5|right|.5
0.75|right|3/4
0.75|right|\frac{3}{4}
0.75|right|\dfrac34
0.75|right|6/8
1.5|right|1 1/2
1.5|right|1\frac{1}{2}
2.5|right|2½
0.5|right|½
1234|right|1,234
1234|right|1{,}234
1234|right|1\,234
1234|right|1 234
1234567|right|1,234,567
1234567|right|1 234 567
12|wrong|1,2
5000|right|5 thousand
5e6|right|5 million
2000|right|2 \times 10^3
2000|right|2×10³
0.002|right|2e-3
25|right|5^2
25|right|5²
5|right|$5$
5|right|\$5
5|right|$5
$5|right|5
$5|right|5 dollars
$5|wrong|€5
$5|right|$5
5|right|\(5\)
5|right|**5**
5|right|There are 5 apples on 3 tables.
7|right|So 3 apples plus 4 apples gives 7.
5|right|There are 3 cats and 2 dogs, so 5 animals.
5|right|The answer is 5, since 3+2=5
7|right|The answer is 7 because 3 + 2 = 5 and 5+2=7
42|right|So the answer is 42!
42|right|42!
345|wrong|3:45
45|wrong|3:45
3|unreadable|3.45.2
5|wrong|(3, 5)
5|wrong|[3, 5]
5|wrong|3, 5
5|wrong|3 and 5
5|unreadable|five
5|unreadable|none
5|wrong|f(5)
5|wrong|x_5
5|wrong|x5
5|wrong|5i
5|wrong|5\pi
4|right|\sqrt{16}
120|wrong|5!
5|right|about 5
5|right|≈5
5|right|x ≈ 5
5|right|approximately 5
5|wrong|5 ± 1
90°|right|90
90|right|90^\circ
90|right|90 degrees
90°|right|90^{\circ}
25 cm^2|right|25 cm²
25 cm^2|right|25 square centimeters
25 cm^2|wrong|25 cm
60 km/h|right|60 km/h
60 km/h|right|60 kilometers per hour
60 km/h|right|60
60 km/h|wrong|60 m/s
2 hours|right|120 minutes
6 apples|right|6
6 apples|right|6 apples
6 apples|right|6 red apples
6 apples|wrong|6 oranges
6 apples|right|There are 6 apples in the picture.
3|right|答案是3
3|right|答案是3个
3|right|答案：３
3|right|一共有3只猫。
12|right|共有１２个
3|unreadable|答案不是3
3|wrong|5 in total
5|right|5 in total
5 in|right|5 inches
5|right|5 of them
5|right|The value of x is 5.
5|right|I count 5.
5|right|Total: 5
5|wrong|1. 5
5|right|Answer: $x = 5$
5|right|The area is $3 \times 4 - 7 = 5$.
16|right|The result is 4^2 = 16.
5|right|5 (five)
5|right|n=5 cells
1000|right|1e3
10|right|1e1
99999999|right|99,999,999
5|right|5 = x
0|right|0
0|right|-0
5|right|+5
5|right|"5"
5|right|Level 5
5|wrong|A5
5|wrong|5th
12|right|12 o'clock
5|wrong|2 + 3x
5|wrong|5x + 2
5|wrong|5 + x
5|wrong|5*x
5|wrong|5/x
5|wrong|x/5
3|wrong|3n
3|wrong|3y+2
5|wrong|5 <= x <= 7
5|right|\{5\}
5|right|5\%
7|right|7 cells, 3 of them red
5|right|<answer>5
5|right|\boxed{5}
5|right|\boxed{5 \text{ cm}}
5 cm|right|\boxed{5}
5 cm|right|\boxed{5\,\mathrm{cm}}
5 cm|wrong|\boxed{5\,\mathrm{m}}
50%|right|\boxed{50}
50%|right|\boxed{50\%}
10|wrong|\boxed{10^5}
3|wrong|\boxed{3x}
5|wrong|\boxed{x>5}
5|wrong|\boxed{x \ge 5}
5|right|The answer is 5.⏎I checked it 3 times.
5|right|Step 1: there are 3.⏎Step 2: there are 2 more.⏎5
5|right|<think>3 + 4 = 7?</think>5
5|wrong|\boxed{5}⏎No: \boxed{6}
5|unreadable|\boxed{5} or \boxed{6}
120|right|\boxed{5!}
5|wrong|\boxed{5!}
5|unreadable|
5|unreadable|I cannot count them.
5|unreadable|The answer is five.
5|unreadable|<think>5
7|unreadable|seven
７|right|7
5|right|Answer: 5
5|right|The final answer is 5.
5|right|\boxed{5}.
5|right|$\boxed{5}$
5|right|\boxed{\text{5}}
5|right|\boxed{5\text{ apples}}
5|right|\boxed{x = 5}
5|right|5 apples
5|right|five (5)
5|right|I count 5 of them.
5|right|There are 5.
5|right|There are exactly 5 birds.
5|right|There are a total of 5 birds.
5|right|In total there are 2 + 3 = 5 birds.
5|right|2 + 3 = 5
5|right|2+3=5.
5|right|The answer is 5, not 6.
5|right|5 (not 6)
5|right|The answer is not 6 but 5.
5|right|5.00
5|right|05
5|right|５
5|right|⑤
5|right|*5*
5|right|`5`
5|right|(5)
5|right|[5]
5|right|5!
5|right|~5
5|right|≈ 5
5|right|5 units
5|right|5 km
5|right|<answer>5</answer>
5|right|<answer>5 apples</answer>
5|right|#### 5
5|right|答案是5。
5|right|答案为５
5|right|一共5个
5|right|答えは5です
5|right|So there are 5 left.
5|right|Step 1: 2. Step 2: 3. Answer: 5
5|right|The number of birds is 5.
5|right|Number of birds: 5
5|right|5, since 2 + 3 = 5
5|right|f(2) = 5
5|right|\frac{10}{2}
5|right|10/2
5|right|\sqrt{25}
5|right|\$5.00
5|wrong|6
5|wrong|50
5|wrong|5.1
5|wrong|0.5
5|wrong|15
5|wrong|5,000
5|wrong|5x
5|wrong|5a
5|wrong|5y + 1
5|wrong|x^5
5|wrong|5^2
5|wrong|5²
5|wrong|10^{-5}
5|wrong|x < 5
5|wrong|x ≤ 5
5|wrong|> 5
5|wrong|<5
5|wrong|\geq 5
5|wrong|less than 5
5|wrong|up to 5
5|wrong|over 5
5|wrong|no more than 5
5|wrong|5+
5|wrong|5-6
5|wrong|4-5
5|wrong|4 to 5
5|wrong|5 to 6
5|wrong|between 5 and 6
5|wrong|between 4 and 5
5|wrong|5±1
5|wrong|5:30
5|wrong|1/5
5|wrong|5/2
5|wrong|(5, 6)
5|wrong|(4, 5)
5|wrong|[0, 5]
5|wrong|5, 6
5|wrong|4, 5
5|wrong|4 and 5
5|wrong|\{4, 5\}
5|wrong|3+5i
5|wrong|5\sqrt{2}
5|wrong|\log 5
5|wrong|\sin 5
5|wrong|-(5)
5|wrong|--5
5|wrong|5e3
5|wrong|5 million
5|wrong|5 thousand
5|wrong|5 dozen
5|wrong|a5
5|wrong|\sqrt{5}
5|wrong|≠ 5
5|wrong|2(5)
5|wrong|5(2)
5|wrong|2*5
5|unreadable|5 or 6
5|unreadable|4 or 5
5|unreadable|either 4 or 5
5|unreadable|The answer is not 5.
5|unreadable|It can't be 5.
5|unreadable|isn't 5
5|unreadable|5 is incorrect
5|unreadable|5?
5|unreadable|I see some birds.
5|unreadable|no idea
5|unreadable|several
-5|right|− 5
-5|right|–5
-5|right|The answer is -5.
-5|right|minus five (-5)
-5|right|\boxed{-5}
0.5|right|1/2
0.5|right|0.50
0.5|right|\frac12
50%|right|50 %
50%|right|50\%
50%|right|\frac{1}{2}
50%|right|half (50%)
50%|wrong|0.5%
50%|wrong|500
5 cm|right|5.0 cm
5 cm|right|\boxed{5 \text{ cm}}
5 cm|right|$5\,\text{cm}$
5 cm|right|It is 5 cm long.
5 cm|right|5 centimetres
5 cm|wrong|5 mm
5 cm|wrong|5 kg
5 cm|wrong|6 cm
5 cm|wrong|5 cm^2
5 cm|wrong|10^5 cm
5 cm|wrong|5x cm
5 m|wrong|5 cm
5 m/s|right|5 m/s
5 m/s|right|18 km/h
5 m/s|right|5
5 m/s|wrong|5 m
1,234|right|1234
1,234|right|1,234
1,234|right|1 234
1,234|wrong|1.234
1234|right|1,234.0
$1,000|right|1000
$1,000|right|$1000
20 years|right|20
20 years|right|20 years old
20 years|wrong|20 days
12 apples|right|12
12 apples|right|twelve (12)
3 dogs|wrong|3 cats
45°|right|45
45°|right|45°
45°|right|45 degrees
45°|right|45^\circ
3/4|right|0.75
3/4|right|3/4
3/4|right|\frac{3}{4}
3/4|right|75%
3/4|wrong|4/3
3/4|wrong|3
10|wrong|10**5
10|wrong|10e5
3|wrong|3\times x
3|wrong|3π
100|right|10^2
100|right|10**2
5|right|There are 5 people in the picture, 2 of them women.
5|right|5 people, 2 of them women
5|right|The answer is **5** (3 + 2).
5|right|I can see five: 5
5|right|I see 2 on the left and 3 on the right, so 5 in total.
5|right|2 on the left plus 3 on the right makes 5.
5|right|2 + 3 equals 5
5|right|= 5
5|right|$= 5$
5|right|$x = 5$
5|right|\[ x = 5 \]
5|right|\boxed{5\,}
5|right|\boxed{\;5\;}
5|right|\boxed{5 }
5|right|\boxed{{5}}
5|right|\boxed{(5)}
5|right|\boxed{\mathbf{5}}
5|right|\boxed{\$5}
5|right|\boxed{5^\circ}
5|right|\boxed{5\text{ cm}^2}
5|right|\boxed{\text{5 cm}}
5|right|\boxed{\frac{10}{2}}
5|right|\boxed{5.0}
5|right|\boxed{\text{The answer is 5}}
5|right|\boxed{n = 5}
5|right|\boxed{\approx 5}
5|right|The value is approximately 5.
5|right|<answer>5.</answer>
5|right|<answer>x = 5</answer>
5|right|Answer: 5 apples
5|right|Answer: five (5)
5|right|5 .
5|right|The answer is 5⏎
5|right|5⏎⏎Explanation: 2 + 3.
5|right|US$5
5|right|5 USD
5|right|Rs. 5
5|wrong|\boxed{5x}
5|wrong|\boxed{5 + x}
5|wrong|\boxed{x^5}
5|wrong|\boxed{5^x}
5|wrong|\boxed{x \le 5}
5|wrong|\boxed{5\pi}
5|wrong|\boxed{-5}
5|wrong|\boxed{5, 6}
5|wrong|\boxed{(5, 6)}
5|wrong|\boxed{[5, 6]}
5|wrong|\boxed{5 \pm 1}
5|wrong|\boxed{5:1}
5|wrong|\boxed{5 \times 10^3}
5|wrong|\boxed{\sqrt{5}}
5|wrong|\boxed{\frac{5}{2}}
5|wrong|\boxed{\frac{1}{5}}
5|wrong|\boxed{5\%2}
5|wrong|\boxed{5\cdot 2}
5|wrong|\boxed{|5 - 1|}
5|wrong|\boxed{5_2}
5|wrong|\boxed{5/x}
5|wrong|\boxed{x - 5}
5|wrong|\boxed{5 - x}
5|wrong|\boxed{f(5)}
5|wrong|\boxed{5 < x < 7}
5|wrong|\boxed{\infty}
5|wrong|about 50
5|wrong|15.
5|wrong|5.5
5|wrong|almost 50
5|wrong|5 and a half
5|wrong|5 hundred
5|wrong|5k
5|wrong|5M
5|wrong|5 1/2
5|wrong|1 5
5|unreadable|5 or 7, I am not sure
5|unreadable|maybe 4 or 5
5|unreadable|It is not 5.
5|unreadable|I don't think it is 5.
5|unreadable|unclear
5|unreadable|<answer></answer>
5|unreadable|\boxed{}
5|unreadable|The answer is unknown.
3.14|right|3.14
3.14|wrong|3.1
3.14|wrong|\pi
0|right|zero (0)
0|wrong|-1
0|right|There are 0.
0|right|0%
10|right|10
10|wrong|1e10
10|wrong|100
10|wrong|10^{10}
10|wrong|log 10
10|wrong|10^-5
10|wrong|10^x
10|wrong|2^{10}
1000000|right|1,000,000
1000000|right|1 million
1000000|right|10^6
1000000|right|1e6
1000000|right|1 \times 10^6
2.5|right|5/2
2.5|right|2 1/2
2.5|right|2\tfrac{1}{2}
-2|right|-2
-2|right|(-2)
-2|right|x=-2
-2|right|−2
-2|right|\boxed{-2}
-2|wrong|2
-2|wrong|1 - 3
30 km/h|right|30 km/h
30 km/h|right|30 kmh
30 km/h|wrong|30 mph
10 kg|right|10kg
10 kg|right|10,000 g
10 kg|wrong|10 g
10 kg|right|The mass is 10 kilograms.
25%|right|25
25%|right|0.25
25%|right|25 percent
25%|right|1/4
25%|wrong|25 cm
$20|right|20 dollars
$20|right|$20.00
$20|right|20
$20|wrong|20 cents
5 minutes|right|300 seconds
5 minutes|right|5 min
5 minutes|wrong|5 hours
"""
"""A reference of kind numeric."""

MATHS = r"""
\frac{1}{2}|right|0.5
\frac{1}{2}|right|\boxed{\frac12}
\frac{1}{2}|right|\dfrac{1}{2}
\frac{1}{2}|right|It follows.⏎The answer is 1/2.
\frac{1}{2}|right|50\%
x^2+2x+1|right|$(x+1)^2$
x^2+1|right|So the function is x^2+1.
x^2+1|right|The answer is $x^2 + 1$, since $x^2 > 0$.
2\pi|right|Answer: **$2\pi$**
\pi|right|\boxed{\pi}
\sqrt{2}|right|\boxed{\sqrt{2}}
\sqrt{8}|right|2\sqrt{2}
2\sqrt{3}|right|The length is $2\sqrt{3}$.
\{1, 2\}|right|2, 1
(1, 2)|right|\boxed{(1,2)}
(1, 2)|right|(1,2)
(1, 2)|right|\left(1, 2\right)
(1, 2)|right|1, 2
(1, 2)|right|The point is $(1, 2)$.
(1, 2)|right|The coordinates are (1.0, 2).
(1, 2)|right|(x, y) = (1, 2)
(\frac{1}{2}, 3)|right|(0.5, 3)
[0, 5)|right|[0,5)
(-\infty, 3]|right|\left(-\infty, 3\right]
x>5|right|5<x
x>5|right|x > 5
x \ge 5|right|\boxed{x\geq 5}
x=5|right|5
5|right|x=5
10^5|right|100000
10^5|right|10^{5}
10^5|right|10⁵
42|right|So the area is $42\text{ cm}^2$.
42|right|There are **42** cells.
0.5|right|The answer is $\frac{1}{2}$.
5\text{ cm}|right|5
5\text{ cm}|right|5 cm
\text{red}|right|\boxed{\text{red}}
\text{red}|right|red
$5$|right|5
-\frac{3}{4}|right|-0.75
-\frac{3}{4}|right|−3/4
1,000|right|1000
1, 2|right|x = 1 or x = 2
1, 2|right|\boxed{1}, \boxed{2}
\frac{\sqrt{3}}{2}|right|<answer>\frac{\sqrt{3}}{2}
e^{2}|right|e^2
3x|right|\boxed{3x}
\frac{1}{2}|wrong|\frac{1}{3}
\frac{1}{2}|wrong|2
\frac{1}{2}|wrong|It is not $\frac{1}{2}$ but $\frac{1}{3}$.
\frac{1}{2}|wrong|-\frac{1}{2}
x^2|wrong|x^3
\pi|wrong|The answer is $2\pi$.
\pi|wrong|3
\pi|unreadable|__import__('os')
(1, 2)|wrong|(2,1)
(1, 2)|wrong|2, 1
(1, 2)|wrong|[1,2]
(1, 2)|wrong|(1,2,3)
(1, 2)|wrong|12
(1, 2)|wrong|1
[0, 5)|wrong|(0,5)
[0, 5)|wrong|[0,5]
[0, 5)|wrong|[0,6)
x>5|wrong|x<5
x>5|wrong|x \ge 5
x>5|wrong|5
x=5|wrong|x=6
10^5|wrong|10
10^5|wrong|10^4
3x|wrong|3
3x|wrong|x^3
5\text{ cm}|wrong|5\text{ m}
\{1, 2\}|wrong|\{1, 3\}
1, 2|wrong|1
\sqrt{2}|wrong|2
\sqrt{2}|wrong|1.4
\text{red}|wrong|\text{blue}
2^{10}|wrong|20
4|wrong|The answer is 42.
\pi|unreadable|I don't know.
\pi|unreadable|
\pi|unreadable|\boxed{}
\pi|unreadable|The answer is not $\pi$.
\frac{1}{2}|unreadable|It is not \frac{1}{2}.
\pi|unreadable|There is none.
\pi|unreadable|<think>\pi
\frac{1}{2}|right|The answer is \boxed{\frac{1}{2}}.
\frac{1}{2}|right|½
\frac{1}{2}|right|x = \frac{1}{2}
2x+1|right|1+2x
2x+1|right|y = 2x+1
2x+1|wrong|2x-1
2x+1|wrong|2
(1,2)|right|\boxed{(1, 2)}
(1,2)|right|( 1 , 2 )
(1,2)|right|The answer is (1, 2).
(1,2)|right|（1，2）
(1,2)|wrong|(1,3)
(1,2)|wrong|{1,2}
(1,2)|wrong|1.2
(3, 4, 5)|right|(3,4,5)
1, 2, 3|right|3, 2, 1
1, 2, 3|wrong|1, 2
[1, 2]|right|[1,2]
[1, 2]|wrong|(1,2)
x>5|right|\boxed{x>5}
x>5|right|The answer is x > 5.
x>5|right|x \gt 5
x>5|wrong|x=5
-3<x<5|right|-3 < x < 5
-3<x<5|wrong|-3 \le x < 5
\sqrt{3}|right|√3
\sqrt{3}|wrong|3
10^5|right|10^5
x^2|right|x²
x^2|wrong|x
\infty|right|∞
5\pi|right|5π
5\pi|wrong|5
\frac{\pi}{2}|right|π/2
\frac{\pi}{2}|right|\dfrac{\pi}{2}
\text{yes}|right|yes
\text{No}|right|\boxed{\text{No}}
\boxed{5}|right|5
$\frac{3}{4}$|right|0.75
25\%|right|25%
\$5|right|5
90^\circ|right|90
5\ \text{cm}|right|5 cm
5\ \text{cm}|wrong|5 m
"""
"""A reference of kind math."""
