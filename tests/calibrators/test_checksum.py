"""A calibration file that was damaged or edited is refused; one of an earlier version still loads."""

import json

import pytest
import torch
from oracle import models
from safetensors import safe_open
from safetensors.torch import save_file

from trainless.errors import CalibrationError
from trainless.patch import calibration


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "made.safetensors"
    tensors = {"heads": torch.tensor([[0, 1]]), "flags": torch.tensor([True]), "none": torch.empty(0, 2)}
    model = models.build("llama")
    calibration.save(path, tensors, measurement="act", model=model, family="llama", facts={"of": "ü"})
    return path


def _parts(path):
    with safe_open(path, framework="pt") as opened:
        return {n: opened.get_tensor(n) for n in opened.keys()}, dict(opened.metadata())


def test_a_file_loads_as_it_was_saved(file):
    tensors, metadata = calibration.load(file)
    assert tensors["heads"].tolist() == [[0, 1]] and metadata["facts"] == {"of": "ü"}


def test_a_flipped_byte_is_seen(file):
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(CalibrationError, match="damaged or edited since"):
        calibration.load(file)


@pytest.mark.parametrize("what", ["value", "shape", "name", "facts", "fingerprint"])
def test_an_edit_is_seen(file, what):
    tensors, metadata = _parts(file)
    if what == "value":
        tensors["heads"] = torch.tensor([[0, 2]])
    elif what == "shape":
        tensors["heads"] = torch.tensor([[0], [1]])
    elif what == "name":
        tensors["more"] = tensors.pop("heads")
    elif what == "facts":
        metadata["facts"] = json.dumps({"of": "more"})
    else:
        metadata["fingerprint"] = "0" * 16
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CalibrationError, match="damaged or edited since"):
        calibration.load(file)


def test_a_file_of_an_earlier_version_loads(file):
    tensors, metadata = _parts(file)
    del metadata["checksum"]
    save_file(tensors, file, metadata=metadata)
    assert calibration.load(file)[0]["heads"].tolist() == [[0, 1]]


def test_an_offloaded_model_is_recognised_by_its_weights(file):
    accelerate = pytest.importorskip("accelerate")
    model, other = models.build("llama"), models.build("llama", seed=5)
    _, metadata = calibration.load(file)
    want = calibration.fingerprint(model)
    for one in (model, other):
        accelerate.cpu_offload(one, execution_device=torch.device("cpu"))
        assert all(p.device.type == "meta" for p in one.parameters())
    assert calibration.fingerprint(model) == want
    calibration.check_fits(file, metadata, "act", model, "llama")
    with pytest.raises(CalibrationError, match="other weights"):
        calibration.check_fits(file, metadata, "act", other, "llama")


def test_a_compiled_model_is_the_same_model():
    model = models.build("llama")
    want = calibration.fingerprint(model)
    assert calibration.fingerprint(torch.compile(model)) == want
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert calibration.fingerprint(model) == want
