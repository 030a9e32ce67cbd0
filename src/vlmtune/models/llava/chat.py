"""The Vicuna prompt as XTuner's template writes it for AuroraCap and LLaVA (xtuner/utils/templates.py, `vicuna`).

Each turn begins with bos; an answer ends with eos, and the newline behind it is not trained. All pictures of a turn
stand in front of its text, a space between two of them and a newline after the last (aurora_map_fn). What stands
between two special tokens or pictures is tokenised by itself, as a text of its own, and so is an answer.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from vlmtune.errors import WeightsError
from vlmtune.models.family import ChatFormat, FrameFormat

VICUNA = "vicuna"
"""The name of this prompt in a native config.json."""

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def vicuna(tokenizer: PreTrainedTokenizerBase, *, where: str) -> ChatFormat:
    """
    Args:
        where: names the folder in errors.

    Raises:
        WeightsError: the tokenizer has no bos or eos token.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if not bos or not eos:
        raise WeightsError(
            "the tokenizer names no bos or no eos token, which begin and end every turn of the Vicuna prompt",
            where=where,
            expected="bos_token and eos_token in tokenizer_config.json",
        )
    user = f"{bos}USER: "
    return ChatFormat(
        opening=user,
        system_opening=(f"{bos}{_SYSTEM}", "\n USER: "),
        bridge=" ASSISTANT:",
        stop=str(eos),
        again=f"{eos}\n{user}",
        close=f"{eos}\n",
        image=("", ""),
        images_first=True,
        runs_alone=True,
        block=("", "", "\n"),
        image_joint=" ",
        fold_newlines=False,
        stop_ids=(int(tokenizer.eos_token_id),),
        frames=FrameFormat(joint=" "),
    )
