"""The exported folder in a process that never imports vlmtune, and an adapter alone under PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.data.sample import Image, MediaRef, Message, Sample, Text
from vlmtune.export.write import export
from vlmtune.infer.session import load
from vlmtune.models.load import open_folder

QUESTION = "What is in this picture?"

# What a user of plain transformers writes; {picture} is how the architecture's own processor spells a picture.
PLAIN = """
import json, sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder, picture, question = sys.argv[1:4]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
pixels = image_processor([Image.open(picture).convert("RGB")], return_tensors="pt")
content = [{"type": "image"}, {"type": "text", "text": question}]
text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
%s
inputs = tokenizer(text, return_tensors="pt")
ids = model.generate(**inputs, **pixels, max_new_tokens=16)
answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"answer": answer, "imported": sorted(name for name in sys.modules if name.startswith("vlmtune"))}))
"""
EXPAND = {
    "internvl": """
tiles = pixels.pop("num_patches", None)
tiles = len(pixels["pixel_values"])
text = text.replace("<IMG_CONTEXT>", "<img>" + "<IMG_CONTEXT>" * (model.config.image_seq_length * tiles) + "</img>")
""",
    "llava": """
patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
text = text.replace("<image>", "<image>" * patches)
""",
}


def ask(folder: Path, picture: Path) -> Sample:
    parts = (Image(MediaRef(path=str(picture))), Text(QUESTION))
    return Sample(messages=(Message("user", parts),), origin=str(folder))


def without_lead(text: str, folder: Path) -> str:
    """A session takes the template's space before an answer (LLaVA's ``ASSISTANT: ``) off; transformers does not."""
    return text.removeprefix(open_folder(folder).chat.answer_lead)


@pytest.mark.parametrize("kind", sorted(EXPAND))
def test_plain_transformers_gives_the_same_answer(
    kind: str, adapter_folder: Callable[[str, str], Path], rows_file: Path, tmp_path: Path
) -> None:
    out = export(adapter_folder(kind, "lora"), tmp_path / "out", device="cpu").out
    picture = rows_file.with_name("3.png")
    (expected,) = load(adapter_folder(kind, "lora"), device="cpu").generate([ask(out, picture)], 16)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN % EXPAND[kind], str(out), str(picture), QUESTION], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["imported"] == []
    assert without_lead(said["answer"], out) == expected != ""


def test_the_model_s_own_processor_gives_the_same_answer(
    adapter_folder: Callable[[str, str], Path], rows_file: Path, tmp_path: Path
) -> None:
    """LLaVA's processor class works without torchvision, so one call does it all."""
    code = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture, question = sys.argv[1:4]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder, backend="pil")
content = [{"type": "image", "image": Image.open(picture).convert("RGB")}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                       return_tensors="pt", add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=16)
print(json.dumps(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""
    out = export(adapter_folder("llava", "rslora"), tmp_path / "out", device="cpu").out
    picture = rows_file.with_name("5.png")
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), str(picture), QUESTION], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (expected,) = load(out, device="cpu").generate([ask(out, picture)], 16)
    assert without_lead(json.loads(done.stdout.splitlines()[-1]), out) == expected


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_an_adapter_alone_loads_with_peft_on_the_base(
    method: str, adapter_folder: Callable[[str, str], Path], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    code = """
import sys, torch, warnings
warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that do not fit
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(input_ids=torch.arange(20)[None], use_cache=False).logits, sys.argv[3])
assert not [name for name in sys.modules if name.startswith("vlmtune")]
"""
    import torch

    adapter = adapter_folder("internvl", method)
    arguments = [str(tiny_folder("internvl")), str(adapter), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        ours = load(adapter, device="cpu").model(input_ids=torch.arange(20)[None], use_cache=False).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours, atol=1e-6, rtol=0)
