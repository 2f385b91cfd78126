"""generate() in every way of decoding: works with the right result, or is refused by name."""

import pytest
import torch
from oracle import models
from transformers import DynamicCache

import trainless
from trainless.cache import CompressingLayer
from trainless.patchers import get

from .cases import LANGUAGE, MAIN_CAUSAL, Case, named
from .tools import build, same

ON_LLAMA = [c for c in LANGUAGE if "llama" in c.families]
WATCHING = [c for c in ON_LLAMA if c.wide is not None]
OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def _model():
    return build("llama", dtype=torch.float32, exact=False)


def _generate(model, ids, mask=None, tokens=8, **more):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **{**OPTIONS, **more})


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_greedy_is_the_hand_written_loop(case: Case):
    model = _model()
    trainless.patch(model, case.method, **case.parameters)
    ids = models.prompt(16)
    found = _generate(model, ids)
    cache, given, logits = DynamicCache(), ids, []
    for _ in range(len(found.logits)):
        out = model(given, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        logits.append(out)
        given = out.argmax(-1, keepdim=True)
    same(found.logits, logits)


@pytest.mark.parametrize(**named(WATCHING))
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_beams_at_full_budget_are_stock(case: Case, padded: bool):
    model = _model()
    ids, mask = models.left_padded([14, 9]) if padded else (models.prompt(14), None)
    beams = {"num_beams": 3, "output_logits": False, "output_scores": True}
    stock = _generate(model, ids, mask, **beams)
    with trainless.patched(model, case.method, **case.wide):
        found = _generate(model, ids, mask, **beams)
    assert torch.equal(found.sequences, stock.sequences)
    assert torch.equal(found.sequences_scores, stock.sequences_scores)


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_beams_score_what_their_own_sequence_scores(case: Case):
    """Every beam's score is the sum of log-probabilities that its tokens have when fed alone."""
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    ids = models.prompt(15)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, num_beams=3,
        num_return_sequences=3, do_sample=False, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    assert found.sequences.unique(dim=0).shape[0] == 3
    for row, score in zip(found.sequences, found.sequences_scores, strict=True):
        cache, total, given = DynamicCache(), 0.0, ids
        for token in row[15:]:
            logits = model(given, past_key_values=cache).logits[0, -1].float()
            total += float(logits.log_softmax(-1)[token])
            given = token[None, None]
        assert total == pytest.approx(float(score), abs=2e-4)


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_turns_with_the_returned_cache(case: Case):
    """generate() continues a conversation: the same as the calls made by hand."""
    model = _model()
    trainless.patch(model, case.method, **case.parameters)
    ids, more = models.prompt(14, 1), models.prompt(4, 2)
    first = _generate(model, ids, tokens=5, min_new_tokens=5)
    cache = first.past_key_values
    assert cache.get_seq_length() == 18
    second = _generate(model, torch.cat([first.sequences, more], 1), tokens=4, past_key_values=cache)
    own = DynamicCache()
    given, tokens = ids, []
    for _ in range(5):
        logits = model(given, past_key_values=own).logits[:, -1].clone()
        logits[:, 2] = -torch.inf
        given = logits.argmax(-1, keepdim=True)
        tokens.append(given)
    assert torch.equal(torch.cat(tokens, 1), first.sequences[:, 14:])
    given, logits = torch.cat([given, more], 1), []
    for _ in range(len(second.logits)):
        out = model(given, past_key_values=own).logits[:, -1]
        logits.append(out)
        given = out.argmax(-1, keepdim=True)
    same(second.logits, logits, 1e-5)


@pytest.mark.parametrize(**named(ON_LLAMA))
@pytest.mark.parametrize("chunk", [4, 5, 17])
def test_prefill_in_chunks(case: Case, chunk: int):
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    ids, mask = models.left_padded([19, 12])
    if case.chunks == "refused":
        with pytest.raises(trainless.Unsupported, match=rf"{case.method}.*prefill_chunk_size"):
            _generate(model, ids, mask, prefill_chunk_size=chunk)
        _generate(model, ids, mask, tokens=2)
        return
    whole = _generate(model, ids, mask)
    parts = _generate(model, ids, mask, prefill_chunk_size=chunk)
    assert torch.equal(whole.sequences, parts.sequences)
    same(parts.logits, whole.logits, 2e-6)  # generate() returns logits in float32
    for a, b in zip(whole.past_key_values.layers, parts.past_key_values.layers, strict=True):
        if isinstance(a, CompressingLayer):
            assert a.kept() == b.kept()


STATIC = {"attn_temperature", "head_gain", "h2o", "streaming", "tova", "snapkv", "kvquant", "zipcache", "act"}
STATIC |= {"keydiff", "knorm", "random", "xattention"}


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_a_static_cache_is_refused_by_name_or_right(case: Case):
    model = _model()
    ids = models.prompt(14)
    patch = trainless.patch(model, case.method, **case.parameters)
    if case.method in STATIC and not case.by_head:
        same(_generate(model, ids, cache_implementation="static").logits, _generate(model, ids).logits, 3e-5)
    else:
        with pytest.raises(trainless.Unsupported, match=rf"{case.method}.*(static|Static)"):
            _generate(model, ids, cache_implementation="static")
    patch.remove()
    _generate(model, ids, cache_implementation="static")


@pytest.mark.parametrize(**named(ON_LLAMA))
def test_embeddings_instead_of_ids(case: Case):
    model = _model()
    trainless.patch(model, case.method, **case.parameters)
    ids = models.prompt(15)
    by_ids = _generate(model, ids)
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids),
        max_new_tokens=8, **OPTIONS,
    )  # fmt: skip
    same(embedded.logits, by_ids.logits)


def _compresses(case: Case) -> bool:
    return get(case.method).evicts or get(case.method).packs


@pytest.mark.parametrize(**named([c for c in ON_LLAMA if not _compresses(c)]))
def test_without_a_cache_every_call_is_a_prefill(case: Case):
    model = build("llama")
    trainless.patch(model, case.method, **case.parameters)
    ids = models.prompt(15)
    found = _generate(model, ids, tokens=4, use_cache=False)
    for number, logits in enumerate(found.logits):
        whole = model(found.sequences[:, : 15 + number], use_cache=False).logits[:, -1]
        same([logits], [whole.float()], 2e-6)


@pytest.mark.parametrize(**named([c for c in ON_LLAMA if _compresses(c)]))
def test_without_a_cache_there_is_nothing_to_compress(case: Case):
    """Generating so is refused; a call by itself is what it is without a cache, and the report says so."""
    model = _model()
    ids = models.prompt(15)
    stock = model(ids, use_cache=False).logits
    with trainless.patched(model, case.method, **case.parameters) as patch:
        with pytest.raises(trainless.Unsupported, match=f"{case.method}: generate.use_cache=False"):
            _generate(model, ids, tokens=4, use_cache=False)
        found = model(ids, use_cache=False).logits
        if not case.pattern:
            same([found], [stock])
            assert patch.report().methods[0].acted == 0
            assert "changed nothing" in str(patch.report())


@pytest.mark.parametrize(**named(MAIN_CAUSAL))
def test_sampling_and_several_sequences(case: Case):
    model = _model()
    trainless.patch(model, case.method, **case.parameters)
    ids = models.prompt(15)

    def draw():
        torch.manual_seed(3)
        options = {**OPTIONS, "do_sample": True, "num_return_sequences": 3}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **options)

    first, second = draw(), draw()
    assert first.sequences.shape[0] == 3 and torch.equal(first.sequences, second.sequences)


class _Gone:
    """A streamer whose reader went away."""

    calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls > 3:
            raise BrokenPipeError

    def end(self):
        pass


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_generation_that_a_streamer_has_ended_leaves_nothing_behind(more):
    model, ids = _model(), models.prompt(16)
    stock = _generate(model, ids).sequences
    with trainless.patched(model, "h2o", heavy=3, recent=2):
        want = _generate(model, ids).sequences
        for _ in range(2):
            with pytest.raises(BrokenPipeError):
                _generate(model, ids, streamer=_Gone(), **more)
            assert torch.equal(_generate(model, ids, **more).sequences, want)
    assert torch.equal(_generate(model, ids).sequences, stock)
