"""load_config: overrides, paths, defaults; and every message that a mistake gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.config.explain import leaves
from vlmtune.config.hints import HINTS
from vlmtune.config.load import dump_config, is_hub_id, load_config
from vlmtune.config.schema import FullTuning, HubSource, LoraTuning, RunConfig, Section, SourceConfig, XTunerLists
from vlmtune.errors import ConfigError

MINIMAL = "model: {path: m}\ndata:\n  sources: {path: a.json}\n"

Load = Callable[..., RunConfig]
Mistake = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a YAML text as `run.yaml` of the current folder."""
    monkeypatch.chdir(tmp_path)

    def call(text: str, *overrides: str) -> RunConfig:
        Path("run.yaml").write_text(text, encoding="utf-8")
        return load_config(Path("run.yaml"), overrides)

    return call


@pytest.fixture
def mistake(load: Load) -> Mistake:
    """The message that a YAML text gives."""

    def call(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return call


def test_minimal_file_fills_the_defaults(load: Load, tmp_path: Path) -> None:
    config = load(MINIMAL)
    assert config.tuning == FullTuning()
    assert config.model.path == str(tmp_path / "m")
    assert config.data.sources[0].path == str(tmp_path / "a.json")
    assert config.train.output_dir == str(tmp_path / "runs" / "run")


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  learnig_rate: 1\n", "run.yaml:5: train.learnig_rate: unknown key; did you mean learning_rate?"),
        ("modle: {}\n", "run.yaml:4: modle: unknown key; did you mean model?"),
        ("train: {packing: true}\n", "run.yaml:4: train.packing: unknown key; did you mean data.packing?"),
        (
            "train: {patience: 3}\n",
            "run.yaml:4: train.patience: unknown key; did you mean train.early_stopping.patience?",
        ),
        ("tuning:\n  method: lora\n  rank: 0\n", "run.yaml:6: tuning.rank: found 0; expected at least 1."),
        (
            "tuning:\n  method: lorra\n",
            "run.yaml:5: tuning.method: 'lorra' is not one of full, lora, dora, rslora, qlora; did you mean lora?",
        ),
        (
            "tuning: {method: full, rank: 3}\n",
            "run.yaml:4: tuning.rank: is an option of LoRA, but the method is full; write method: lora "
            "(or dora, rslora, qlora), or remove it.",
        ),
        (
            "tuning: {rank: 3}\n",
            "run.yaml:4: tuning.rank: is an option of LoRA, but no method is given. "
            "Add `method: lora` (or dora, rslora, qlora) under tuning.",
        ),
        (
            "tuning: {method: lora, train: [visoin]}\n",
            "run.yaml:4: tuning.train.0: 'visoin' is not one of vision, projector, language; did you mean vision?",
        ),
        (
            "tuning: {learning_rates: {visoin: 1}}\n",
            "run.yaml:4: tuning.learning_rates.visoin: 'visoin' is not one of vision, projector, language; "
            "did you mean vision?",
        ),
        ("tuning: lora\n", "run.yaml:4: tuning: found the text 'lora'; expected {method: …}."),
        (
            "tuning: {method: lora, targets: [vision], train: [vision]}\n",
            "run.yaml:4: tuning: vision stands in both targets and train; a component has one or the other.",
        ),
        ("train: {epochs: many}\n", "run.yaml:4: train.epochs: found the text 'many'; expected a number."),
        ("train: {epochs: true}\n", "run.yaml:4: train.epochs: found true; expected a number."),
        ("train: {max_steps: false}\n", "run.yaml:4: train.max_steps: found false; expected a whole number."),
        ("train: {seed: 1.5}\n", "run.yaml:4: train.seed: found the number 1.5; expected a whole number."),
        (
            "train: {learning_rate: .nan}\n",
            "run.yaml:4: train.learning_rate: found the number nan; expected a finite number.",
        ),
        (
            "train: {deterministic: ja}\n",
            "run.yaml:4: train.deterministic: found the text 'ja'; expected true or false.",
        ),
        (
            "train: {precision: fp32}\n",
            "run.yaml:4: train.precision: 'fp32' is not one of auto, float32, bfloat16; did you mean float32?",
        ),
        ("train: {betas: [0.9]}\n", "run.yaml:4: train.betas.1: missing; found a list of 1."),
        (
            "train: {early_stopping: true}\n",
            "run.yaml:4: train.early_stopping: found true; expected {} for the defaults, "
            "or the keys patience, min_delta.",
        ),
        (
            "train:\n  epochs:\n",
            "run.yaml:5: train.epochs: nothing stands after the colon; expected a number, "
            "or leave the key out for 1.0.",
        ),
        (
            "train: {output_dir: 3}\n",
            "run.yaml:4: train.output_dir: found the number 3; expected text (put it in quotes).",
        ),
        ("train: {extra: 3}\n", "run.yaml:4: train.extra: found the number 3; expected a group of keys."),
        (
            "train: {early_stopping: {}}\n",
            "run.yaml: train.early_stopping needs data.eval: without held-out rows there is nothing to watch.",
        ),
        (
            "version: 2\n",
            "run.yaml:4: version: the file has format 2, but this vlmtune reads format 1. "
            "Install a newer vlmtune (`pip install -U vlmtune`).",
        ),
        ("version: 0\n", "run.yaml:4: version: found the number 0; expected 1."),
        ("version: '1'\n", "run.yaml:4: version: found the text '1'; expected 1."),
    ],
)
def test_one_mistake_is_one_sentence_with_its_line(mistake: Mistake, text: str, message: str) -> None:
    assert mistake(MINIMAL + text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: m}\ndata: {}\n", "run.yaml:2: data.sources: missing; expected a list of {path: …}."),
        ("model: {path: m}\ndata: {sources: []}\n", "run.yaml:2: data.sources: is empty."),
        (
            "model: {path: m}\ndata: {sources: [{path: a}, 3]}\n",
            "run.yaml:2: data.sources.1: found the number 3; expected a group of keys.",
        ),
        (
            "model: {path: m}\ndata: {sources: a.json}\n",
            "run.yaml:2: data.sources: found the text 'a.json'; expected a list of {path: …}.",
        ),
        (
            "model:\ndata: {sources: {path: a}}\n",
            "run.yaml:1: model.path: missing: folder of the pretrained model (or a hub id, which needs the network).",
        ),
        ("model: {path: ''}\ndata: {sources: {path: a}}\n", "run.yaml:1: model.path: is empty."),
        ("data: {sources: {path: a}}\n", "run.yaml: model: missing; expected {path: …}."),
    ],
)
def test_mistakes_in_the_needed_sections(mistake: Mistake, text: str, message: str) -> None:
    assert mistake(text) == message


def test_the_index_of_a_source_is_named_as_the_file_has_it(mistake: Mistake) -> None:
    listed = "model: {path: m}\ndata:\n  sources:\n    - {path: a}\n    - path: b\n      rot: c\n"
    assert mistake(listed) == "run.yaml:6: data.sources.1.rot: unknown key; did you mean root?"
    alone = "model: {path: m}\ndata:\n  sources:\n    path: b\n    rot: c\n"
    assert mistake(alone) == "run.yaml:5: data.sources.rot: unknown key; did you mean root?"


def test_several_mistakes_are_listed_in_the_order_of_the_file(mistake: Mistake) -> None:
    text = mistake(MINIMAL + "train:\n  seed: x\n  lr: 3\ntuning:\n  method: lora\n  rank: -1\n", "eval.batch_size=0")
    assert text.split("\n") == [
        "run.yaml: 4 mistakes",
        "  command line: eval.batch_size: found 0; expected at least 1.",
        "  run.yaml:5: train.seed: found the text 'x'; expected a whole number.",
        "  run.yaml:6: train.lr: unknown key; did you mean learning_rate?",
        "  run.yaml:9: tuning.rank: found -1; expected at least 1.",
    ]


@pytest.mark.parametrize(
    ("section", "key", "answer"),
    [
        ("train", "num_train_epochs", "did you mean epochs?"),
        ("train", "per_device_train_batch_size", "did you mean micro_batch_size?"),
        ("train", "gradient_accumulation_steps", "did you mean global_batch_size (accumulation is derived from it)?"),
        ("train", "output", "did you mean output_dir?"),
        ("train", "deepspeed", "did you mean strategy (zero1, zero2 or zero3)?"),
        ("model", "max_dynamic_patch", "did you mean model.image.max_tiles?"),
        ("model", "hd_num", "did you mean model.image.max_tiles (4khd models only)?"),
        ("model", "img_size", "did you mean model.image.size?"),
        ("model", "trust_remote_code", "remove it: code from a model folder is never run."),
        ("data", "max-seq-length", "did you mean max_length?"),
    ],
)
def test_names_of_other_tools_are_understood(mistake: Mistake, section: str, key: str, answer: str) -> None:
    text = mistake(MINIMAL + "train: {}\n", f"{section}.{key}=1")
    assert text == f"command line: {section}.{key}: unknown key; {answer}"


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha", "lora_dropout"])
def test_lora_names_of_other_tools(mistake: Mistake, key: str) -> None:
    ours = {"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}[key]
    text = mistake(MINIMAL + f"tuning:\n  method: lora\n  {key}: 8\n")
    assert text == f"run.yaml:6: tuning.{key}: unknown key; did you mean {ours}?"


def test_an_unknown_train_key_names_train_extra(mistake: Mistake) -> None:
    assert "go into train.extra" in mistake(MINIMAL + "train: {adam_epsilon: 1}\n")


def test_every_hint_points_at_an_option_and_hides_none() -> None:
    options = set(leaves())
    assert {hint.key for hint in HINTS.values() if hint.key} <= options
    # `batch_size` is ours under `eval`, and a foreign name under `train`.
    assert set(HINTS) & {path.rpartition(".")[2] for path in options} == {"batch_size"}


# --- sources ------------------------------------------------------------------------------------------------------


def test_tiles_of_all_sources_have_one_size(mistake: Mistake) -> None:
    text = "model: {path: m}\ndata:\n  sources: {path: a.json, image: {max_tiles: 2, size: 56}}\n"
    assert mistake(text).startswith("run.yaml:3: data.sources.image: size is the same for all sources")


def test_like_lengths_need_rows_that_are_padded(mistake: Mistake) -> None:
    text = "model: {path: m}\ndata:\n  sources: {path: a.json}\n  group_by_length: true\n"
    assert "set data.packing: false beside it" in mistake(text)


def test_the_three_kinds_of_sources(load: Load, tmp_path: Path) -> None:
    text = """model: {path: m}
data:
  sources:
    - {path: a.json, repeat: 1.5, replace_prefix: {/old/: images/, 'D:\\': ""}}
    - {hub: owner/name, split: train, data_files: x/*, choose: 100}
    - {data_paths: [a.json, b.jsonl, c.json], image_folders: [a, null, c], repeat_times: [2, 0.5, 3.5]}
  eval: {data_paths: a.json, image_folders: img, repeat_times: 1}
"""
    config = load(text)
    first, second, third = config.data.sources
    assert isinstance(first, SourceConfig) and isinstance(second, HubSource) and isinstance(third, XTunerLists)
    assert config.hub_datasets == ("owner/name",)
    assert first.replace_prefix == {"/old/": f"{tmp_path}/images", "D:\\": ""}
    assert second.data_files == ("x/*",) and second.choose == 100
    assert third.image_folders == (f"{tmp_path}/a", None, f"{tmp_path}/c") and third.repeat_times == (2, 0.5, 3.5)
    (alone,) = load(text).data.eval
    assert isinstance(alone, XTunerLists) and alone.data_paths == (f"{tmp_path}/a.json",)
    again = load(dump_config(load(text)))
    assert again == load(text), "the resolved file says the same"


def test_a_replacement_in_a_tar_is_no_folder(load: Load, tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    text = "model: {path: m}\ndata: {sources: {path: a, root: x.tar, replace_prefix: {/old/: coco/}}}\n"
    assert load(text).data.sources[0].replace_prefix == {"/old/": "coco/"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{data_paths: [a, b], image_folders: [c]}",
            ": image_folders has 1 entries, but data_paths has 2; give every file its folder, or null.",
        ),
        (
            "{data_paths: [a, b], image_folders: [null, c], repeat_times: 2}",
            ": repeat_times has 1 entries, but data_paths has 2; give every file its number.",
        ),
        ("{data_paths: []}", ".data_paths: is empty."),
        ("{data_paths: [a], repeat_times: [0]}", ".repeat_times.0: found 0; expected more than 0."),
        ("{data_paths: [a, 3]}", ".data_paths.1: found the number 3; expected text (put it in quotes)."),
        (
            "{data_paths: [a], repeat: 2}",
            ".repeat: belongs to a source with path or hub, but this one has data_paths; "
            "write the number into repeat_times.",
        ),
        ("{path: a, repeat: 2, weight: 1}", ": repeat and weight say the same thing in different ways; give one"),
        (
            "{path: a, repeat: 2, choose: 3, weight: 1}",
            ": repeat, choose and weight say the same thing in different ways; give one of them.",
        ),
        (
            "{path: a, hub: b/c}",
            ".path: does not go with hub; a source has one of them, so make two entries, or remove one.",
        ),
        (
            "{path: a, data_paths: [b]}",
            ".path: does not go with data_paths; a source has one of them, so make two entries, or remove one.",
        ),
        ("{hub: a/b, root: c}", ".root: belongs to a source with path, but this one has hub."),
        ("{hub: ''}", ".hub: is empty."),
        ("{path: a, root: 3}", ".root: is no path; expected a folder, a tar file, or a list of them."),
        ("{path: a, root: [b, '']}", ".root: is no path; expected a folder, a tar file, or a list of them."),
        ("{path: a, repeat: 0}", ".repeat: found 0; expected more than 0."),
        ("{path: a, choose: 1.5}", ".choose: found the number 1.5; expected a whole number."),
        ('{path: "a\\0b"}', ".path: holds a zero byte, which no path can."),
        ("{path: a, image: {max_tiles: 1000000000}}", ".image.max_tiles: found 1000000000; expected at most 1000."),
        ("{path: a, image: {max_tile: 3}}", ".image.max_tile: unknown key; did you mean max_tiles?"),
        ("{path: a, replace_prefix: x}", ".replace_prefix: found the text 'x'; expected a group of keys."),
        ("{root: a}", ".path: missing: a .json list, a .jsonl file,"),
        ("{annotation: a}", ".annotation: unknown key; did you mean path?"),
        ("{path: a, image_folder: b}", ".image_folder: unknown key; did you mean root?"),
        ("{path: a, repeat_time: 2}", ".repeat_time: unknown key; did you mean repeat?"),
        ("{path: a, sampling_ratio: 2}", ".sampling_ratio: unknown key; did you mean weight?"),
        ("{path: a, proportion: 2}", ".proportion: unknown key; did you mean weight?"),
        ("{path: a, num_samples: 2}", ".num_samples: unknown key; did you mean choose?"),
        ("{path: a, max_dynamic_patch: 2}", ".max_dynamic_patch: unknown key; did you mean image: {max_tiles: …}?"),
        ("{path: a, length: 2}", ".length: unknown key; remove it: rows are counted."),
        ("{hub: a/b, repeat_time: 2}", ".repeat_time: unknown key; did you mean repeat?"),
    ],
)  # fmt: skip
def test_mistakes_in_sources(mistake: Mistake, source: str, message: str) -> None:
    text = mistake(f"model: {{path: m}}\ndata:\n  sources:\n    - {{path: x}}\n    - {source}\n")
    said = [line.strip() for line in text.split("\n")]
    assert any(line.startswith(f"run.yaml:5: data.sources.1{message}") for line in said), text


# --- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_are_yaml(load: Load) -> None:
    config = load(
        MINIMAL,
        "train.epochs=3",
        "data.packing=false",
        "tuning.method=lora",
        "tuning.targets=[language,vision]",
        "train.learning_rate=1e-5",
        "train.extra.adam_epsilon=1e-7",
        "data.sources.repeat=2",
        "model.image={max_tiles: 6}",
        "train.epochs=4",
    )
    assert config.train.epochs == 4
    assert config.data.packing is False
    assert isinstance(config.tuning, LoraTuning)
    assert config.tuning.targets == ("language", "vision")
    assert config.train.learning_rate == 1e-5
    assert config.train.extra == {"adam_epsilon": 1e-7}
    assert config.data.sources[0].repeat == 2
    assert config.model.image.max_tiles == 6


def test_an_empty_value_is_the_default_of_an_optional_key(load: Load) -> None:
    assert load(MINIMAL + "train: {max_steps: 3}\n", "train.max_steps=").train.max_steps is None


def test_overrides_reach_into_lists(load: Load, mistake: Mistake) -> None:
    listed = "model: {path: m}\ndata: {sources: [{path: a}, {path: b}]}\n"
    assert load(listed, "data.sources.1.repeat=2").data.sources[1].repeat == 2  # type: ignore[union-attr]
    hub = load(listed, "data.sources.1={hub: a/b, split: val}", "data.sources.1.choose=7").data.sources[1]
    assert isinstance(hub, HubSource) and hub.split == "val" and hub.choose == 7
    assert mistake(listed, "data.sources.1.repeat=x") == (
        "command line: data.sources.1.repeat: found the text 'x'; expected a number."
    )
    assert mistake(listed, "data.sources.2.path=c") == (
        "command line: data.sources.2.path: data.sources is a list with the entries 0 to 1; 2 is none of them."
    )
    assert mistake(listed, "data.sources.path=c").startswith("command line: data.sources.path: data.sources is a list")
    assert mistake(MINIMAL, "data.sources.0.path=c") == (
        "command line: data.sources.0.path: data.sources is not a list; leave the 0 out."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "'train.epochs' is not an override; expected key=value, for example train.epochs=3."),
        ("=3", "'=3' is not an override; expected key=value, for example train.epochs=3."),
        ("train..epochs=3", "'train..epochs=3' is not an override; expected key=value, for example train.epochs=3."),
        ("train.epoch=3", "train.epoch: unknown key; did you mean epochs?"),
        ("train.epochs=x", "train.epochs: found the text 'x'; expected a number."),
        (
            "train.betas=[1",
            "train.betas: is not YAML: expected ',' or ']', but got '<stream end>'. "
            "Is a bracket, a brace or a quote left open?",
        ),
        ("model.path.x=3", "model.path.x: model.path is the text 'm'; it has no keys."),
    ],
)
def test_mistakes_in_overrides_say_so(mistake: Mistake, override: str, message: str) -> None:
    assert mistake(MINIMAL, override) == f"command line: {message}"


def test_empty_sections_are_defaults(load: Load) -> None:
    config = load(MINIMAL + "train:\n  # epochs: 3\ntuning:\neval:\n")
    assert config.train.epochs == 1.0
    assert config.tuning == FullTuning()


# --- paths --------------------------------------------------------------------------------------------------------


def test_relative_paths_start_from_the_folder_of_the_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs with space" / "图"
    folder.mkdir(parents=True)
    (folder / "ui.yaml").write_text(
        "model: {path: ../m}\n"
        "data: {sources: {path: a.json, root: img}, eval: [{path: /e.json}], allow: [x, /y]}\n"
        "train: {output_dir: out}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("runs with space/图/ui.yaml"))
    assert config.model.path == str(tmp_path / "runs with space" / "m")
    assert config.data.sources[0].path == str(folder / "a.json")
    assert config.data.sources[0].root == str(folder / "img")
    assert (config.data.eval[0].path, config.data.eval[0].root) == ("/e.json", None)
    assert config.data.allow == (str(folder / "x"), "/y")
    assert config.train.output_dir == str(folder / "out")


def test_a_home_folder_is_expanded(load: Load) -> None:
    assert load(MINIMAL, "model.path=~/m").model.path == str(Path.home() / "m")


def test_a_hub_id_stays_unless_it_is_a_folder(load: Load, tmp_path: Path) -> None:
    assert load(MINIMAL, "model.path=OpenGVLab/InternVL3-1B-hf").model.path == "OpenGVLab/InternVL3-1B-hf"
    assert is_hub_id("OpenGVLab/InternVL3-1B-hf")
    for path in ("./org/name", "org/name/", "a/b/c", "name", "../name", "/abs/name"):
        assert not is_hub_id(load(MINIMAL, f"model.path={path}").model.path)
    # A folder `models` beside the YAML: a model that is missing in it is missing, not on the hub.
    (tmp_path / "models").mkdir()
    assert load(MINIMAL, "model.path=models/absent").model.path == str(tmp_path / "models" / "absent")


def test_every_path_of_the_schema_is_made_absolute(load: Load) -> None:
    """Guards against a new option with a path that `config.load` forgets."""
    paths = {p for p in leaves() if p.rpartition(".")[2].endswith(("path", "root", "dir", "file", "folder", "allow"))}
    assert paths - {"tuning.drop_path"} == {  # a share, not a path
        "model.path",
        "data.sources.path",
        "data.sources.root",
        "data.eval.path",
        "data.eval.root",
        "data.allow",
        "train.output_dir",
    }


# --- the resolved file --------------------------------------------------------------------------------------------


def test_the_resolved_file_loads_to_the_same_from_anywhere(load: Load, tmp_path: Path) -> None:
    config = load(
        MINIMAL,
        "tuning={method: dora, train: [projector], learning_rates: {projector: 1e-5}}",
        "data.eval={path: v.json}",
        "train.early_stopping={}",
        "train.extra={adam_epsilon: 1e-7, a: 'no', b: '1e-5', c: [1, {d: null}], e: .inf, f: '图'}",
        "model.path=org/name",
    )
    other = tmp_path / "elsewhere" / "resolved.yaml"
    other.parent.mkdir()
    other.write_text(dump_config(config), encoding="utf-8")
    assert load_config(other) == config


def test_the_resolved_file_spells_out_every_option(load: Load) -> None:
    sources = "{sources: [{path: a}, {hub: a/b}, {data_paths: [a]}]}"
    text = dump_config(load(f"model: {{path: m}}\ndata: {sources}\ntuning: {{method: lora}}\n"))
    for option in leaves():
        assert f"{option.rpartition('.')[2]}:" in text or option in (
            "train.early_stopping.patience",
            "train.early_stopping.min_delta",
        )


def test_every_option_has_a_range_or_a_choice_or_a_docstring() -> None:
    def sections(kind: type[Section]) -> list[type[Section]]:
        return [kind, *(one for child in kind.__subclasses__() for one in sections(child))]

    undocumented = {
        f"{kind.__name__}.{name}"
        for kind in sections(Section)
        for name, field in kind.model_fields.items()
        if field.description is None
    }
    # Ratchet: the names that say everything. Shorten the list, do not extend it.
    assert undocumented <= {
        "ModelConfig.image",
        "FullTuning.method",
        "LoraTuning.method",
        "LoraTuning.rank",
        "LoraTuning.dropout",
        "DataConfig.sources",
        "TrainConfig.epochs",
        "TrainConfig.learning_rate",
        "TrainConfig.schedule",
        "TrainConfig.weight_decay",
        "TrainConfig.max_grad_norm",
        "TrainConfig.seed",
        "TrainConfig.early_stopping",
        "RunConfig.model",
        "RunConfig.tuning",
        "RunConfig.data",
        "RunConfig.train",
        "RunConfig.eval",
    }


def test_reading_a_configuration_does_not_import_torch(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    code = (
        "import sys; from pathlib import Path; from vlmtune.config.load import load_config;"
        "load_config(Path(sys.argv[1])); sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
