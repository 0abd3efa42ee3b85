"""Which option a text names: each line of the first table beside one of the second that looks much like it."""

from __future__ import annotations

import time

import pytest

from rewards.accuracy import accuracy
from rl_lvr.answers.letters import letter

NAMED = r"""
B|B
(b)|B
B. red|B
[C]|C
The answer is D.|D
option: (A)|A
\boxed{B}|B
\text{B}|B
\textbf{(B)}|B
\mathrm{B}|B
**B**|B
__B__|B
$B$|B
\(B\)|B
The answer is **B**.|B
**Answer:** B|B
**Answer: B**|B
Answer: B. red|B
Answer: B) red|B
answer: b|B
ANSWER: (b)|B
Answer: B red|B
Option B|B
Option B.|B
Option B: red|B
option (B)|B
**Option B** - red|B
The correct answer is (B) red.|B
The correct answer is option B.|B
The correct option is B, red.|B
The answer is $\boxed{\text{B}}$.|B
I think B is wrong, the answer is C|C
I think B is wrong, the answer is C.|C
The answer is A. Wait, the answer is B.|B
The answer is B, not A.|B
The answer is B, not option A.|B
The answer is B and not C.|B
The answer is B because A is blue.|B
The answer is A because it is red.|A
The answer is A.|A
My answer is A!|A
B!|B
So the answer is A, since it is red|A
A. A cat|A
B - red|B
B is correct.|B
B is wrong and C is correct.|C
(C) is the right answer.|C
Not option A but option B.|B
B. A red cell|B
C. I, II and III|C
Therefore, I choose option D|D
The answer is C. Option B is wrong.|C
The final answer is: B|B
The answer to this question is (B) red.|B
The answer is therefore B.|B
The answer is "B".|B
The answer is 'B'.|B
the answer is a|A
Final Answer: \(\boxed{C}\)|C
The answer must be E.|E
The best choice is C|C
The answer is B\nred|B
"""
"""A text, and the letter in it; \\n stands for a new line."""

UNNAMED = r"""
A cat sits on the mat
A cat
red
AB
I think so
the answer is Dog
Neither A nor B
Neither A nor B is correct.
The answer is not B
The answer isn't B.
The answer is a cat
Answer: A cat sits on the mat.
Answer: I think so
The answer is A or B
The answer is A and B.
A or B
A, B
(A) (B)
Answer: A, B, C
Answer: A/B
Option B is wrong.
Option B is not correct.
It is not option B.
I would rule out option B.
Option A is a distractor, option B is blue
The wrong answer is B.
It is not the case that the answer is B
If the answer is B, it is red.
the answer is C-shaped
Answer: x = 5
The answer is E=mc^2
The answer is neither A nor B
Options: A) red B) blue
option A or option B
Answer: B or C
Either A or B is correct.
I'd say the answer
The answer lies between B and C
Plan B failed
The answer is A?
Both A and B are correct!
Vitamin C
Answer: B is wrong.
I, for one, am lost
The answer is A-
a red cell
The first option is A) red
As option B says, red.
"""


@pytest.mark.parametrize("line", NAMED.strip().splitlines())
def test_a_letter_is_read(line: str) -> None:
    text, _, expected = line.replace(r"\nred", "\nred").rpartition("|")
    assert letter(text) == expected
    assert accuracy([f"<answer>{text}</answer>"] * 2, [expected, "Z"]) == [1, 0]


@pytest.mark.parametrize("text", [*UNNAMED.strip().splitlines(), ""])
def test_no_letter_is_read_where_none_is_meant(text: str) -> None:
    assert letter(text) is None


def test_where_the_answer_stands_does_not_matter() -> None:
    texts = ["It is red.\nThe answer is **B**.", r"So \boxed{\text{B}}", "<answer>Option B</answer>", "Hm.\n(B) red"]
    assert accuracy(texts, ["B"] * 4) == [1] * 4
    assert accuracy(texts, ["C"] * 4) == [0] * 4


@pytest.mark.parametrize(
    "text",
    [
        "answer: B " * 3000,
        "answer:" + " :" * 10000,
        r"\text{" * 3000 + "B" + "}" * 3000,
        "B" + " " * 20000 + "x",
        "not " * 5000 + "answer is B.",
        "is not B or " * 3000,
        "the answer is " * 3000,
        "(" * 20000 + "B",
    ],
    ids=range(8),
)
def test_no_text_takes_long(text: str) -> None:
    began = time.perf_counter()
    letter(text)
    assert time.perf_counter() - began < 2
