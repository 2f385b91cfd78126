"""verify beside other threads: their calls wait for its end, and what would wait for ever is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from contract.tools import same
from diffusers import DDIMScheduler, StableDiffusionPipeline
from oracle import models
from transformers import CLIPTextConfig, CLIPTextModel

import trainless
from trainless.hosts.diffusers.geometry import CONTEXT
from trainless.verify import sole

from .toys import llama, status


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another patch"])
def test_no_call_of_another_thread_is_unpatched_meanwhile(beside: bool) -> None:
    """With a patch alone on the model the gate itself goes off and on."""
    model, ids = llama(torch.float64, layers=3), models.prompt(12, 1)
    if beside:
        trainless.patch(model, "head_gain", heads=[[1, 2]], gain=0.3)
    made = trainless.patch(model, "attn_temperature", temperature=0.5)
    want = model(ids).logits
    got: list[torch.Tensor] = []
    over, begun = threading.Event(), threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not over.is_set():
                try:
                    got.append(model(ids).logits)
                except trainless.Unsupported:
                    got.append(torch.zeros_like(want))
                begun.set()

    worker = threading.Thread(target=serve)
    worker.start()
    try:
        assert begun.wait(30)
        found = made.verify()
    finally:
        over.set()
        worker.join()
    assert set(status(found).values()) <= {"ok", "not checked"} and "ok" in status(found).values()
    same(got, [want] * len(got))
    same([model(ids).logits], [want])


def test_a_probe_that_calls_in_a_thread_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sole, "PATIENCE", 0.2)
    model, ids = llama(), models.prompt(12, 1)
    made = trainless.patch(model, "attn_temperature", temperature=0.5)

    def probe(patched: Any) -> torch.Tensor:
        found: list[Any] = []

        def work() -> None:
            try:
                found.append(patched(ids).logits)
            except trainless.Unsupported as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    with pytest.raises(trainless.InputError, match="must call the model in its own thread"):
        made.verify(probe)
    assert made.verify()
    made.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_pipeline_beside_an_untouched_text_encoder_keeps_the_runs_under_way() -> None:
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=encoder, tokenizer=None, unet=models.build("unet"), safety_checker=None,
        feature_extractor=None, scheduler=DDIMScheduler(), requires_safety_checker=False,
    )  # fmt: skip
    made = trainless.patch(pipe, "attn_temperature", temperature=0.5)
    runs = vars(pipe.unet)[CONTEXT].local
    assert "failed" not in status(made.verify()).values()
    assert vars(pipe.unet)[CONTEXT].local is runs


def test_a_call_that_waited_for_a_patch_meets_its_hooks() -> None:
    """Torch lists the hooks of a call when it begins: those that come while it waits have to be run all the same."""
    model, ids = llama(torch.float64), models.prompt(12, 1)
    trainless.patch(model, "attn_temperature", temperature=0.5)
    gate = vars(model)["_trainless_station"].gate
    got: list[torch.Tensor] = []
    called: list[str] = []

    def longer(module: Any, args: Any, kwargs: Any) -> Any:
        called.append("with keywords")
        return (torch.cat([args[0], ids[:, :1]], 1),), kwargs

    def serve() -> None:
        with torch.no_grad():
            got.append(model(ids).logits)

    worker = threading.Thread(target=serve)
    with gate.closed():
        worker.start()
        while not gate.changed._waiters:  # type: ignore[attr-defined]  # until the worker's call waits
            pass
        model.register_forward_pre_hook(longer, with_kwargs=True)
        model.register_forward_pre_hook(lambda *unused: called.append("without"))
    worker.join()
    assert called == ["with keywords", "without"]
    assert got[0].shape[1] == 13
