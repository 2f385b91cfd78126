"""Other people's tools on the same model: LoRA, accelerate's hooks, attention implementations, pipelines."""

import pytest
import torch
from oracle import models, replay
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache

import trainless

from .cases import MAIN, MAIN_CAUSAL, Case, named
from .tools import CALLS, EXACT, Snapshot, build, dense, differs, outputs, same, text

pytestmark = pytest.mark.ways

F32 = 2e-4  # float32, other kernels


def _model(**more):
    return build("llama", dtype=torch.float32, exact=False, **more)


# ---------------------------------------------------------------- attention implementations


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(**named(MAIN_CAUSAL))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])
def test_set_attn_implementation_before_or_after(case: Case, implementation: str, padded: bool):
    reference = _model()
    trainless.patch(reference, case.method, **case.parameters)
    want = outputs(reference, "llama", padded)
    first, second = _model(), _model()
    first.set_attn_implementation(implementation)
    stock = outputs(first, "llama", padded)
    trainless.patch(first, case.method, **case.parameters)
    patch = trainless.patch(second, case.method, **case.parameters)
    second.set_attn_implementation(implementation)
    assert second.config._attn_implementation == implementation
    same(outputs(first, "llama", padded), want, F32)
    same(outputs(second, "llama", padded), outputs(first, "llama", padded))
    patch.remove()
    same(outputs(second, "llama", padded), stock)
    assert second.config._attn_implementation == implementation


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:_compile flag")
@pytest.mark.parametrize(**named(MAIN_CAUSAL))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "single"])
def test_flex_attention_with_its_block_masks(case: Case, padded: bool):
    """Every call meets a BlockMask: prefill, steps, and a turn of several tokens on what an evictor kept."""
    model = build("llama")
    with dense(model, "llama", case):
        want = outputs(model, "llama", padded)
    model.set_attn_implementation("flex_attention")
    met = []
    watch = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: met.append(type(kwargs["attention_mask"])), with_kwargs=True
    )
    # The inductor cannot compile flex attention for a CPU at this head width; run as it is, it says the same.
    with torch.compiler.set_stance("force_eager"):
        stock = outputs(model, "llama", padded)
        patch = trainless.patch(model, case.method, **case.parameters)
        assert differs(want, stock)
        same(outputs(model, "llama", padded), want, EXACT)
        patch.remove()
        same(outputs(model, "llama", padded), stock)
    watch.remove()
    again = 1 if case.method == "kvzip" else 0  # a prompt that is read a second time
    assert met == [BlockMask] * (3 * len(CALLS) + again)


def test_output_attentions_stay_available_where_the_method_delegates():
    model = build("llama", attn_implementation="eager")
    trainless.patch(model, "attn_temperature", temperature=0.5)
    out = model(models.prompt(9), output_attentions=True)
    assert len(out.attentions) == 3
    rows = torch.ones(1, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(out.attentions[0].double().sum(-1), rows, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- LoRA


def _lora(model, seed: int = 0):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return adapted


@pytest.mark.parametrize("order", ["lora-first", "patch-first", "patch-inner"])
@pytest.mark.parametrize(**named(MAIN_CAUSAL))
def test_lora_before_and_after_patching(case: Case, order: str):
    ids, mask = text()
    merged = _lora(_model()).merge_and_unload().eval()
    stock = replay(merged, None, ids, mask, CALLS)
    trainless.patch(merged, case.method, **case.parameters)
    want = replay(merged, None, ids, mask, CALLS)
    model = _model()
    if order == "patch-first":
        patch = trainless.patch(model, case.method, **case.parameters)
        adapted = _lora(model)
    else:
        adapted = _lora(model)
        patch = trainless.patch(adapted if order == "lora-first" else model, case.method, **case.parameters)
    rows = mask.bool().split(CALLS, 1)

    def real(found):
        return [a[r] for a, r in zip(found, rows, strict=True)]

    same(real(replay(adapted, None, ids, mask, CALLS)), real(want), F32)
    with adapted.disable_adapter():
        plain = _model()
        trainless.patch(plain, case.method, **case.parameters)
        same(real(replay(adapted, None, ids, mask, CALLS)), real(replay(plain, None, ids, mask, CALLS)), F32)
    patch.remove()
    same(real(replay(adapted, None, ids, mask, CALLS)), real(stock), F32)
    assert not [k for m in adapted.modules() for k in vars(m) if "trainless" in k]


def test_lora_can_be_merged_and_taken_off_under_a_patch():
    model = _model()
    patch = trainless.patch(model, "h2o", heavy=4, recent=3)
    adapted = _lora(model)
    before = outputs(adapted, "llama")
    merged = adapted.merge_and_unload()
    same(outputs(merged, "llama"), before, F32)
    patch.remove()


def test_generate_with_lora_and_a_patch():
    model = _model()
    adapted = _lora(model)
    patch = trainless.patch(adapted, "h2o", heavy=4, recent=3)
    ids = models.prompt(14)
    found = adapted.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    assert found.shape[1] > 14 and patch.report().methods[0].layers[0]["tokens_kept"] == 7


# ---------------------------------------------------------------- accelerate


def _hooked(model, kind: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    if kind == "offload":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=torch.device("cpu"))
        return
    for layer in model.model.layers:
        hooks.add_hook_to_module(
            layer.self_attn, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        )


@pytest.mark.parametrize("kind", ["align", "offload"])
@pytest.mark.parametrize("order", ["hooks-first", "patch-first"])
@pytest.mark.parametrize(**named(MAIN_CAUSAL))
def test_accelerate_hooks(case: Case, order: str, kind: str):
    reference = _model()
    stock = outputs(reference, "llama")
    trainless.patch(reference, case.method, **case.parameters)
    want = outputs(reference, "llama")
    model = _model()
    if order == "hooks-first":
        _hooked(model, kind)
    patch = trainless.patch(model, case.method, **case.parameters)
    if order == "patch-first":
        _hooked(model, kind)
    same(outputs(model, "llama"), want)
    patch.remove()
    same(outputs(model, "llama"), stock)
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    if kind == "align":
        same(outputs(model, "llama"), stock)
        assert not [k for m in model.modules() for k in vars(m) if "trainless" in k]


# ---------------------------------------------------------------- pipelines


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 67)}}
    inner = Tokenizer(WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.mark.parametrize("target", ["pipeline", "model"])
@pytest.mark.parametrize(**named(MAIN_CAUSAL))
def test_a_transformers_pipeline(case: Case, target: str):
    from transformers import pipeline

    prompts = [" ".join(f"w{n}" for n in models.prompt(length)[0].tolist()) for length in (14, 9)]
    model = _model()
    pipe = pipeline("text-generation", model=model, tokenizer=_tokenizer(), batch_size=2)

    def run():
        found = pipe(prompts, max_new_tokens=6, do_sample=False, return_full_text=False)
        return [row[0]["generated_text"] for row in found]

    stock = run()
    before = Snapshot(pipe.model)
    patch = trainless.patch(pipe if target == "pipeline" else model, case.method, **case.parameters)
    changed = run()
    assert patch.report().methods[0].fired and all(isinstance(t, str) for t in changed)
    alone = [
        pipe(p, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
        for p in prompts
    ]
    assert alone == changed
    trainless.unpatch(pipe)
    assert run() == stock
    before.check(pipe.model)


# ---------------------------------------------------------------- dtype, training


@pytest.mark.parametrize(**named(MAIN))
def test_a_model_that_changes_its_dtype_under_the_patch(case: Case):
    family = case.families[0]
    model = build(family, dtype=torch.float32, exact=False)
    patch = trainless.patch(model, case.method, **case.parameters)
    want = outputs(model, family)
    torch.nn.Module.to(model, torch.float64)
    same([t.float() for t in outputs(model, family)], want, 5e-4)
    torch.nn.Module.to(model, torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 and torch.isfinite(t).all() for t in outputs(model, family))
    patch.remove()


@pytest.mark.parametrize(**named(MAIN_CAUSAL))
def test_gradients_flow_through(case: Case):
    """Attribution and fine-tuning on top of a patch: the gradient is that of the changed function."""
    model = build("llama", layers=3)
    trainless.patch(model, case.method, **case.parameters)
    # A longer edited prefill has no gradient (torch says so); its forward works, see the next test.
    ids = models.prompt(14 if case.method == "act" else 18)
    embedded = model.get_input_embeddings()(ids)
    with torch.enable_grad():
        leaf = embedded.clone().requires_grad_()
        loss = model(inputs_embeds=leaf).logits.square().mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6

    def at(sign):
        return model(inputs_embeds=embedded + sign * step * direction).logits.square().mean()

    slope = (at(1) - at(-1)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(**named(MAIN_CAUSAL))
def test_forward_without_no_grad(case: Case):
    """Forgetting torch.no_grad() costs memory, never the result."""
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    calls = [20, 1, 1]
    want = outputs(model, "llama", True, calls)
    model.requires_grad_(True)
    with torch.enable_grad():
        cache, found = DynamicCache(), []
        ids, mask = text()
        positions = mask.cumsum(1).sub(1).clamp_min(0)
        for start, stop in ((0, 20), (20, 21), (21, 22)):
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            logits = model(ids[:, start:stop], past_key_values=cache, **given).logits
            found.append(logits[mask[:, start:stop].bool()].detach())
    same(found, want, EXACT)
