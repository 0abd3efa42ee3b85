"""A byte-level BPE tokenizer built from a list of words, with a family's special tokens and a chat template.

Special tokens come first, then bytes, then pieces of the words: no id equals the one that the same token has
in a released checkpoint, so a hard-coded id fails at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rl_lvr.errors import UserError
from rl_lvr.models import family_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (PAD, TURN_START, TURN_END)
ROLES = ("system", "user", "assistant", "tool")

# Four tokens around a turn's content; the newline keeps the role a token of its own. `generation` marks what
# the assistant writes, its end of turn included: the mask of TRL's `assistant_only_loss` comes from it.
_CHAT_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}
{{- 'IMAGE' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{{- show(message.content) + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- show(message.content) + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_tokenizer(model_type: str, words: Sequence[str], markers: Sequence[str]) -> PreTrainedTokenizerBase:
    """Tokenizer of a family in which every word is one token, with and without a space before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    family = family_class(model_type)
    vision = dict(family.tiny_tokens)
    specials = [*SPECIALS, *vision.values(), *markers]
    for word in words:
        if not word or any(letter.isspace() for letter in word):
            raise UserError(f"tiny tokenizer: {word!r} is no word: it is empty or holds a space.")
        if any(special in word for special in specials):
            raise UserError(f"tiny tokenizer: the word {word!r} contains a special token.")

    core = Tokenizer(models.BPE(unk_token=None))
    # Split at spaces only, so that a word may hold digits and punctuation.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\S+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    # No bound on the vocabulary: merging goes on until every word is one token.
    trainer = trainers.BpeTrainer(
        vocab_size=1_000_000,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([text for word in dict.fromkeys(words) for text in (word, " " + word)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=PAD,
        model_specific_special_tokens=vision,
        extra_special_tokens=[TURN_START, *markers],
        chat_template=_CHAT_TEMPLATE.replace("IMAGE", family.tiny_image),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
