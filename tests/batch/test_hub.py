"""A name that is no model is told at once: by the hub's answer, or because there is none."""

from __future__ import annotations

import time

import pytest

from trainless.errors import InputError
from trainless.models import hub, locate


@pytest.fixture
def api(monkeypatch, tmp_path):
    """Replace the hub: ``answer`` is called for every question, and downloads are counted."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = []

    def use(answer, cached=None):
        class Api:
            def model_info(self, repo, revision=None, timeout=None):
                asked.append((repo, revision, timeout))
                return answer()

            dataset_info = model_info

        def download(repo, revision, allow_patterns, local_files_only):
            asked.append(("download", local_files_only))
            if local_files_only and cached is None:
                raise FileNotFoundError("not in the cache")
            return str(cached)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return use


def unreachable():
    raise OSError("Name or service not known")


def refusing(status):
    from huggingface_hub.errors import HfHubHTTPError

    class Response:
        status_code, headers, request = status, {}, None

    def answer():
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        Exception.__init__(error, f"{status} Client Error")
        error.response = Response()
        raise error

    return answer


def test_what_the_hub_does_not_have_is_not_downloaded(api):
    asked = api(refusing(404))
    with pytest.raises(InputError, match=r"the hub does not give it .*404.*did you mean demo:smollm2\?"):
        locate("smolm2")
    assert asked == [("smolm2", None, hub.PATIENCE)]


@pytest.mark.parametrize("answer", [unreachable, refusing(503), refusing(429)])
def test_the_cache_serves_where_the_hub_cannot(api, tmp_path, answer):
    asked = api(answer, cached=tmp_path)
    found = locate("a/b@main")
    assert found.offline and found.origin == ("a/b", {"local_files_only": True, "revision": tmp_path.name})
    assert asked == [("a/b", "main", hub.PATIENCE), ("download", True)]
    api(answer)
    with pytest.raises(
        InputError, match=r"the hub cannot be asked .* its cache on this machine does not have it"
    ):
        locate("a/b")


def test_a_hub_that_never_answers_is_not_waited_for(api, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    api(lambda: time.sleep(3))
    started = time.monotonic()
    with pytest.raises(InputError, match="no answer in 0 s"):
        locate("a/b")
    assert time.monotonic() - started < 2


def test_a_model_that_is_there_is_downloaded(api, tmp_path):
    asked = api(lambda: None, cached=tmp_path)
    found = locate("a/b")
    assert not found.offline and found.origin == ("a/b", {"revision": tmp_path.name})
    assert asked[-1] == ("download", False)


def test_no_question_is_asked_offline_or_for_what_can_be_no_name(api, monkeypatch):

    asked = api(unreachable)
    with pytest.raises(InputError, match="it is no hub id"):
        locate("a--b..c")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        locate("a/b")
    assert asked == [("download", True)]


def test_models_nearby_are_named(api, tmp_path):
    api(unreachable)
    (tmp_path / "models" / "llama-small").mkdir(parents=True)
    (tmp_path / "models" / "llama-small" / "config.json").write_text("{}")
    (tmp_path / "models" / "llama-smell").mkdir()
    (tmp_path / "models" / "llama-small.gguf").write_text("")
    with pytest.raises(InputError, match=r"did you mean models/llama-small or models/llama-small\.gguf\?"):
        locate("models/llama-smal")
    with pytest.raises(InputError, match=r"no such folder or file.*did you mean demo:shapes-vlm"):
        locate("./nowhere/shapes_vlm")
    with pytest.raises(InputError) as raised:
        locate("some/thing-else-entirely")
    assert "did you mean" not in str(raised.value)


# ---------------------------------------------------------------- datasets


def test_a_dataset_that_is_not_there_is_told_at_once(api, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from trainless.batch.prompts import read_prompts

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (tmp_path / "prompts.txt").write_text("x\n")
    (tmp_path / "prompts.md").write_text("x\n")
    api(refusing(404))
    with pytest.raises(
        InputError, match=r"prompts 'promts' is no file or folder.*404.*did you mean prompts\.txt\?$"
    ):
        read_prompts("promts")
    with pytest.raises(InputError, match=r"no such file or folder; did you mean prompts\.txt\?"):
        read_prompts("prompts.tx")
    api(unreachable)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"`datasets` cannot load it .*did you mean prompts\.txt\?"):
        read_prompts("promts")
    assert time.monotonic() - started < 5 and datasets.config.HF_HUB_OFFLINE is False


def test_a_dataset_is_loaded_where_the_hub_has_it(api, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from trainless.batch.prompts import read_prompts

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    found = datasets.Dataset.from_list([{"prompt": "one"}])
    seen = []

    def load(name):
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return found

    monkeypatch.setattr(datasets, "load_dataset", load)
    for answer in (lambda: None, unreachable):  # the second time from its cache
        api(answer)
        assert [item.prompt for item in read_prompts("some/thing")[0]] == ["one"]
    assert seen == [False, True]
