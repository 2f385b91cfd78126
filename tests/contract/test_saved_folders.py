"""``Patch.save``: nothing but an earlier save is written over."""

import json

import pytest

import trainless

from .tools import build


@pytest.fixture
def patch():
    with trainless.patch(build("llama"), "attn_temperature", temperature=0.5) as made:
        yield made


def test_saving_twice_replaces_the_first(patch, tmp_path):
    folder = patch.save(tmp_path / "saved")
    data = json.loads((folder / "report.json").read_text())
    data["files"].append("gone.safetensors")
    (folder / "report.json").write_text(json.dumps(data))
    (folder / "gone.safetensors").touch()
    (folder / "recipe.yaml.part").touch()  # of a save that was cut short
    patch.save(folder)
    assert {f.name for f in folder.iterdir()} == {"recipe.yaml", "report.json"}
    assert trainless.load_recipe(folder).uses[0].method.temperature == 0.5


def test_a_save_of_an_earlier_version_is_known(patch, tmp_path):
    folder = patch.save(tmp_path / "saved")
    data = json.loads((folder / "report.json").read_text())
    del data["made_by"], data["files"]
    (folder / "report.json").write_text(json.dumps(data))
    (folder / "attn_temperature.safetensors").touch()
    patch.save(folder)
    assert "made_by" in json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": "{}", "model.safetensors": ""}, "holds a model"),
        ({"report.json": '{"model": 1}'}, "is not a saved patch"),
        ({"report.json": "[]"}, "is not a saved patch"),
        ({"notes.txt": ""}, "is not a saved patch"),
    ],
)
def test_other_peoples_folders_are_left_alone(patch, tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(trainless.InputError, match=says):
        patch.save(tmp_path)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == files


def test_a_model_in_a_saved_folder_is_seen(patch, tmp_path):
    patch.save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(trainless.InputError, match=r"holds a model \(config.json\)"):
        patch.save(tmp_path)


def test_a_file_and_a_place_that_cannot_be_written(patch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(trainless.InputError, match="it is a file"):
        patch.save(tmp_path / "file")
    with pytest.raises(trainless.InputError, match="cannot save the patch"):
        patch.save(tmp_path / "file" / "below")
