"""The documents say what the code says: generated parts are fresh, links lead somewhere, code in them runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import trainless
from trainless.patchers import base

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

import generate  # noqa: E402 - it lies in docs/, beside what it writes


@pytest.fixture(scope="module")
def made() -> dict[Path, str]:
    return generate.made()


def test_generated_parts_are_fresh(made: dict[Path, str]) -> None:
    stale = [
        str(f.relative_to(ROOT))
        for f, text in made.items()
        if not f.is_file() or f.read_text("utf-8") != text
    ]
    assert not stale, "run: python docs/generate.py"


def test_a_stale_part_is_seen(made: dict[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin errors -->\nold\n<!-- end errors -->\nafter\n")
    (tmp_path / "docs" / "img").mkdir(parents=True)
    (tmp_path / "docs" / "img" / "seams.svg").write_text(made[ROOT / "docs" / "img" / "seams.svg"])
    (tmp_path / "trainless" / "preview").mkdir(parents=True)
    (tmp_path / "trainless" / "preview" / "advice.json").write_text(
        made[ROOT / "trainless" / "preview" / "advice.json"]
    )
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "pages", lambda: [page])
    assert generate.stale() == [page]
    page.write_text(generate.made()[page])
    assert generate.stale() == []
    text = page.read_text()
    assert (
        text.startswith("before\n") and text.endswith("after\n") and "`NoMatch`" in text and "old" not in text
    )


def test_every_block_is_used_and_every_marker_known() -> None:
    used = [
        name
        for page in generate.pages()
        for name in re.findall(r"<!-- begin ([\w-]+) -->", page.read_text("utf-8"))
    ]
    assert sorted(used) == sorted(set(used)), "a block stands twice"
    assert set(used) <= set(generate.BLOCKS)
    unused = set(generate.BLOCKS) - set(used)
    assert not unused


def test_method_table_names_every_method() -> None:
    table = generate.method_table()
    for name in base.known(aliases=True):
        assert f"`{name}`" in table


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_fits_the_make_file() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text("utf-8"), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_commands_in_the_documents_exist() -> None:
    import typer

    from trainless.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    said = {
        (page.name, word)
        for page in PAGES
        for word in re.findall(r"^trainless ([a-z]+)", page.read_text("utf-8"), re.MULTILINE)
    }
    assert said and {word for _, word in said} <= set(commands), said


def test_the_recipe_in_the_documents_loads(tmp_path: Path) -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "recipes.md"):
        found = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
        assert found, page
        for i, text in enumerate(found):
            file = tmp_path / f"{page.stem}{i}.yaml"
            file.write_text(text, encoding="utf-8")
            assert trainless.load_recipe(file).uses


def test_the_method_in_the_guide_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file shown in docs/add-a-method.md, registered for this test only."""
    import picture
    from transformers import LlamaConfig, LlamaForCausalLM

    source, _ = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "add-a-method.md").read_text("utf-8"), re.DOTALL
    )
    base.known()
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    module = type(sys)("trainless.patchers.quieter")
    module.__package__ = "trainless.patchers"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "add-a-method.md", "exec"), module.__dict__)
    assert set(picture.docstring("quieter")) == set(picture.WORDS)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()  # fmt: skip
    tokens = torch.randint(0, 64, (1, 9))
    with torch.inference_mode():
        stock = model(tokens).logits
        with trainless.patched(model, "quieter", gain=1.0):
            assert torch.equal(model(tokens).logits, stock)
        with trainless.patched(model, "quieter") as patch:
            assert not torch.equal(model(tokens).logits, stock)
            assert patch.report().methods[0].acted == 2
        assert torch.equal(model(tokens).logits, stock)
    with pytest.raises(trainless.InputError, match="0 or more"):
        trainless.patch(model, "quieter", gain=-1.0)
