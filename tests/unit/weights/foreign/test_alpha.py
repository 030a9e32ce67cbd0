"""Where the strength of a foreign LoRA is read from, and that it is never guessed."""

from __future__ import annotations

import re

import pytest

from vlmtune.errors import UsageError, WeightsError
from vlmtune.weights.foreign import alpha

LLM, VIT = "language_model.model.layers.0.attention.wqkv", "vision_model.encoder.layers.0.attn.qkv"

# As mmengine writes a configuration down: either form of XTuner's configs.
DICTS = """
model = dict(
    freeze_llm=True,
    llm_lora=dict(
        lora_alpha=256,
        lora_dropout=0.05,
        r=128,
        task_type='CAUSAL_LM',
        type='peft.LoraConfig'),
    model_path='OpenGVLab/InternVL2-8B',
    type='xtuner.model.InternVL_V1_5',
    visual_encoder_lora=dict(lora_alpha=32, r=16, type='peft.LoraConfig'))
"""


@pytest.mark.parametrize(
    ("text", "language", "vision"),
    [
        (DICTS, 256.0, 32.0),
        ("llm_lora = dict(r=4, lora_alpha=8)", 8.0, None),
        ("model = {'llm_lora': {'lora_alpha': 12.5}}", 12.5, None),
        ("a = dict(llm_lora=dict(lora_alpha=8))\nb = dict(llm_lora=dict(lora_alpha=8))", 8.0, None),
        ("a = dict(llm_lora=dict(lora_alpha=8))\nb = dict(llm_lora=dict(lora_alpha=9))", None, None),
        ("llm_lora = dict(lora_alpha=alpha)", None, None),
        ("llm_lora = dict(lora_alpha=True)", None, None),
        ("llm_lora = None", None, None),
        pytest.param("llm_lora = " + "-" * 200_000 + "1", None, None, id="nested too deep"),
        ("lora_alpha = 8", None, None),
        ("this is no python (", None, None),
        ("", None, None),
    ],
)
def test_of_a_configuration_in_text(text: str, language: float | None, vision: float | None) -> None:
    found = alpha.of_text(text, where="iter_5.pth")
    for module, expected in ((LLM, language), (VIT, vision)):
        if expected is None:
            with pytest.raises(UsageError, match=r"iter_5\.pth: the alpha of the LoRA .*rank 16.* --lora-alpha N"):
                found(module, 16)
        else:
            assert found(module, 16) == expected


def test_text_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = alpha.of_text("print('run')\nllm_lora = dict(lora_alpha=__import__('os').getpid())", where="x")
    with pytest.raises(UsageError):
        found(LLM, 4)
    assert capsys.readouterr().out == ""


def test_of_the_official_trainer() -> None:
    found = alpha.of_official({"use_llm_lora": 16, "use_backbone_lora": 8}, where="folder")
    assert found(LLM, 16) == 32 and found(VIT, 8) == 16
    with pytest.raises(WeightsError, match=re.escape("use_llm_lora is 16, but the LoRA of " + LLM + " has rank 4")):
        found(LLM, 4)
    with pytest.raises(WeightsError, match="use_backbone_lora is None"):
        alpha.of_official({}, where="folder")(VIT, 4)


def test_of_an_adapter() -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {"wqkv": 6, "layers.1.attention.wo": 4}}
    found = alpha.of_adapter(config, where="folder")
    assert found(LLM, 4) == 6 and found("language_model.model.layers.0.attention.wo", 4) == 8
    assert found("language_model.model.layers.1.attention.wo", 4) == 4
    assert found("language_model.model.layers.11.attention.wo", 4) == 8
    scaled = alpha.of_adapter({"lora_alpha": 8, "use_rslora": True}, where="folder")(LLM, 16)
    assert scaled / 16 == 8 / 16**0.5  # PEFT's own: alpha / sqrt(r)
    with pytest.raises(WeightsError, match="lora_alpha is None"):
        alpha.of_adapter({}, where="folder")
