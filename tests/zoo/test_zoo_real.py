import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.zoo import __main__ as command
from benchmarks.zoo import real, real_texts, real_training, sources, training


def test_a_help_page_is_read_without_its_frame() -> None:
    html = (
        "<html><head><title>Titre</title><script>var a = 1 < 2;</script></head><body>"
        "<header><p>Aide</p></header><nav><ul><li>Index</li></ul></nav>"
        "<h1>Les  objets</h1><p>Cliquez <b>ici</b> &amp; l&agrave;.</p><p>Les objets</p><pre>x = 1</pre>"
        "<footer>fin</footer></body></html>"
    )
    assert real_texts.page_text(html) == "Les objets\nCliquez ici & là.\nx = 1"


def help_folder(root: Path, package: sources.Deb, code: str, pages: dict[str, list[str]]) -> None:
    """A package as fetch_deb leaves it."""
    for name, lines in pages.items():
        path = root / f"deb-{package.name}" / "usr/share/libreoffice/help" / code / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"<p>{line}</p>" for line in lines), encoding="utf-8")


def test_lines_that_nobody_translated_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    downloads = tmp_path / "merganser" / "downloads"
    names = [f"calc/{number:02}.html" for number in range(40)]
    english = {name: [f"page {name}", "not translated"] for name in names}
    russian = {name: [f"страница {name}", "not translated"] for name in names}
    help_folder(downloads, real_texts.ENGLISH_HELP, "en-US", english)
    help_folder(downloads, real_texts.HELP["russian"], "ru", russian)
    parts = real_texts.help_pages("russian")
    whole = "".join(parts.values())
    assert whole.count("страница") == 20  # every second page
    assert "not translated" not in whole


def module(verses: dict[int, str]) -> str:
    text, index = "", {}
    for number, verse in verses.items():
        index[number] = len(text)
        text += verse + " "
    return f'bible = Bible(\n    """{text}""",\n    {index},\n'


def test_the_pair_shares_a_third_of_its_prompts_and_no_test_verse() -> None:
    numbers = [40_001_000 + verse for verse in range(1, 101)]
    source = {1_001_001: "old testament"} | {number: f"modern {number}" for number in numbers}
    sets = real_texts.conflicting_pair(
        module(source),
        module({number: f"plain {number}" for number in [1_001_001, *numbers]}),
        module({number: f"olde {number}" for number in numbers}),
    )
    prompts = [
        {name: {line for line in part.splitlines() if line.startswith("Verse:")} for name, part in parts.items()}
        for parts in sets
    ]
    first, second = prompts
    assert not any("old testament" in part for parts in sets for part in parts.values())
    assert len(first["train"]) == len(second["train"]) == 52
    assert len(first["train"] & second["train"]) == 26
    assert first["test"] == second["test"]
    for parts in prompts:
        assert not (first["train"] | second["train"]) & parts["test"]
        assert not parts["tune"] & parts["test"]
    assert "Say it again: plain 40001100\n" in sets[0]["test"]
    assert "Say it again: olde 40001100\n" in sets[1]["test"]


def test_every_model_has_its_own_seed_and_a_known_domain() -> None:
    assert len({settings.seed for settings in real.MODELS.values()}) == len(real.MODELS)
    domains = {real.domain_of(model) for model in real.MODELS}
    assert domains == {
        "french", "german", "russian", "maths", "haskell", "middle_english", "proofs", "medicine",
        "pair_basic", "pair_wycliffe",
    }  # fmt: skip
    assert all(100 <= settings.steps <= 150 for settings in real.MODELS.values())


def test_an_unknown_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["real", "--out", str(tmp_path), "--only", "experts/klingon"]) == 2
    assert "no model 'experts/klingon'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_trial_may_not_take_the_place_of_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["real", "--steps", "2"])
    assert stop.value.code == 2
    assert "--steps needs --out" in capsys.readouterr().err


SETTINGS = training.Settings(steps=2, learning_rate=1e-2, batch=4, length=16, warmup=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro Llama of random weights with a tokenizer, and a text with its tokens beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.zoo import tiny

    folder = tmp_path_factory.mktemp("zoo")
    text = "the quick brown fox jumps over the lazy dog\n\n" * 60
    tiny.make_tokenizer({"english": {"train": text}}, folder / "base")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**tiny.ARCHITECTURE | small)).to(torch.bfloat16).save_pretrained(folder / "base")
    (folder / "text.txt").write_text(text)
    real_training.tokenize(folder / "base", folder / "text.txt", folder / "text.npy")
    return folder / "base"


def test_tokens_are_those_of_the_whole_text(base: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base)((base.parent / "text.txt").read_text(), verbose=False)["input_ids"]
    assert np.load(base.parent / "text.npy").tolist() == ids


def test_a_full_fine_tune_moves_all_but_the_embeddings(base: Path) -> None:
    from safetensors.torch import load_file

    target = base.parent / "expert"
    losses: list[str] = []
    real_training.train_full(lambda done, note: losses.append(note), target, base, base.parent / "text.npy", SETTINGS)
    before, after = load_file(base / "model.safetensors"), load_file(target / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}
    assert len(losses) == 2
    assert (target / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_softmax_runs_over_the_tokens_in_use(base: Path) -> None:
    stream = np.load(base.parent / "text.npy")
    used = len(np.unique(stream))
    assert used < 100  # of 1024
    first: list[float] = []
    real_training.train_full(
        lambda done, note: first.append(float(note.split()[-1])),
        base.parent / "once",
        base,
        base.parent / "text.npy",
        SETTINGS,
    )
    assert first[0] == pytest.approx(np.log(used), abs=0.1)  # random weights know nothing; not log(1024) = 6.9


def test_an_adapter_is_small_and_names_no_path(base: Path) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    settings = real_training.LoraSettings(steps=2, learning_rate=1e-2, batch=4, length=16, warmup=1, rank=2)
    target = base.parent / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls names that transformers has renamed
        real_training.train_lora(lambda *_: None, target, base, base.parent / "text.npy", settings)
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["base_model_name_or_path"] == real_training.UPSTREAM
    assert str(base.parent) not in (target / "adapter_config.json").read_text()
    tensors = load_file(target / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(tensor.count_nonzero() for name, tensor in tensors.items() if "lora_B" in name)
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
