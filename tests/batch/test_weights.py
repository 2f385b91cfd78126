"""A checkpoint without some of its weights is refused by their names, whatever kind of model it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_bert, save_llama
from torch import nn

from trainless.errors import InputError
from trainless.models import load
from trainless.models.complete import IncompleteError, check


def edited(folder: Path, target: Path, file: str, edit) -> Path:
    """A copy of a model whose weight file went through ``edit``."""
    shutil.copytree(folder, target)
    found = load_file(target / file)
    edit(found)
    save_file(found, target / file, metadata={"format": "pt"})
    return target


def without(*keys):
    def edit(found):
        for key in keys:
            del found[key]

    return edit


def test_missing_weights_end_the_run_by_name(run, llama, tmp_path):
    lost = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
    edited(llama, tmp_path / "torn", "model.safetensors", without(*lost))
    Path("p.txt").write_text("a prompt\n")
    code, _, err = run("generate", "torn", "p.txt", "-o", "out")
    assert code == 1 and all(key in err for key in lost) and "2 weights of LlamaForCausalLM" in err
    assert not list(Path("out").glob("part-*"))


def test_a_long_list_is_cut_and_counted(llama, tmp_path):
    def rename(found):
        for key in list(found):
            found[f"other.{key}"] = found.pop(key)

    with pytest.raises(InputError, match=r"lacks 21 weights .* and 16 more\.") as raised:
        load(str(edited(llama, tmp_path / "torn", "model.safetensors", rename)))
    assert len(str(raised.value)) < 700


def test_another_shape_is_named_with_both(llama, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"

    def cut(found):
        found[key] = found[key][:60].contiguous()

    said = rf"has 1 weight of LlamaForCausalLM in another shape: {key} \(is \[60, 32\], must be \[64, 32\]\)"
    with pytest.raises(InputError, match=said):
        load(str(edited(llama, tmp_path / "torn", "model.safetensors", cut)))


def test_tied_weights_are_in_the_checkpoint_once(tmp_path):
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(str(folder)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"embed_tokens\.weight"):
        load(
            str(edited(folder, tmp_path / "torn", "model.safetensors", without("model.embed_tokens.weight")))
        )


def test_an_encoder_without_a_pooling_layer_is_loaded_without_one(tmp_path):
    folder = save_bert(tmp_path / "bert")
    assert load(str(folder)).model.pooler is not None
    pooler = "pooler.dense.weight", "pooler.dense.bias"
    bare = edited(folder, tmp_path / "bare", "model.safetensors", without(*pooler))
    assert load(str(bare)).model.pooler is None
    key = "encoder.layer.0.output.dense.weight"
    with pytest.raises(InputError, match=key):
        load(str(edited(bare, tmp_path / "torn", "model.safetensors", without(key))))


def test_a_vision_language_model(tmp_path):
    pytest.importorskip("PIL")
    from vlm_folders import save_llava

    folder = save_llava(tmp_path / "llava")
    load(str(folder))
    key = next(k for k in load_file(folder / "model.safetensors") if "projector" in k and "weight" in k)
    with pytest.raises(InputError, match=r"projector"):
        load(str(edited(folder, tmp_path / "torn", "model.safetensors", without(key))))


@pytest.mark.parametrize(
    ("file", "key", "owner"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight", "UNet2DConditionModel"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias", "AutoencoderKL"),
        ("text_encoder/model.safetensors", "final_layer_norm.weight", "CLIPTextModel"),
    ],
)
def test_every_part_of_a_pipeline(tmp_path, file, key, owner):
    pytest.importorskip("diffusers")
    from tiny_models import save_stable_diffusion

    folder = save_stable_diffusion(tmp_path / "sd")
    load(str(folder))
    key = next(k for k in load_file(folder / file) if k.endswith(key))
    with pytest.raises(InputError, match=f"lacks 1 weight of {owner}, which would be random: .*{key}"):
        load(str(edited(folder, tmp_path / "torn", file, without(key))))

    def cut(found):
        found[key] = found[key][:1].contiguous()

    with pytest.raises(InputError, match=f"has 1 weight of {owner} in another shape: .*{key}"):
        load(str(edited(folder, tmp_path / "cut", file, cut)))


@pytest.mark.parametrize("lost", [None, "blk.0.attn_q.weight"])
def test_a_gguf_file(tmp_path, lost):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(40)
    words = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(97, 123)), *map(str, range(10)), "x"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(40)])
    writer.add_token_types([2, 3, 3] + [1] * 37)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    square, wide = (16, 16), {"ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}
    shapes = {"token_embd.weight": (40, 16), "output.weight": (40, 16), "output_norm.weight": (16,)}
    shapes |= {f"blk.0.{n}.weight": square for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{n}.weight": shape for n, shape in wide.items()}
    shapes |= {f"blk.0.{n}.weight": (16,) for n in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        if name != lost:
            writer.add_tensor(name, torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if lost is None:
        assert load(str(tmp_path / "m.gguf")).model.config.hidden_size == 16
        return
    with pytest.raises(
        IncompleteError, match=r"lacks 1 weight of LlamaForCausalLM.*layers\.0\.self_attn\.q_proj"
    ):
        load(str(tmp_path / "m.gguf"))


def test_buffers_that_a_class_computes_are_not_missed_and_those_it_has_measured_are():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.register_buffer("position_ids", torch.arange(4))
    check(model, {"missing_keys": ["position_ids", "0.num_batches_tracked"]}, "m")
    with pytest.raises(IncompleteError, match=r"0\.running_var"):
        check(model, {"missing_keys": ["0.running_var"]}, "m")


def test_the_libraries_are_left_as_they_were(llama):
    from transformers import PreTrainedModel

    before = PreTrainedModel.__dict__["from_pretrained"]
    load(str(llama))
    with pytest.raises(InputError):
        load("nowhere/at/all")
    assert PreTrainedModel.__dict__["from_pretrained"] is before
