"""The text encoder against the official code's output, its file formats, and the tokenizer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_pack.wan.t5_keys import check_text_encoder_files, hf_to_official, module_names
from wan_pack.wan.text_encoder import DEFAULT_NEGATIVE_PROMPT, TextEncoder, load_text_encoder
from wan_pack.wan.tokenizer import Tokenizer, clean
from wan_pack.wan.tokenizer_files import find_tokenizer_files

GOLDEN = Path(__file__).parent / "data" / "golden"
MODEL = GOLDEN / "t5_encoder" / "text_encoder" / "model.safetensors"
LAYERS = 2
SENTENCES = (
    "a cat walks on the grass, realistic style",
    "two boxers fight on a spotlit stage",
    "the camera follows a white vintage car up a steep dirt road",
    "summer beach vacation style, a white cat wearing sunglasses sits on a surfboard",
)


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """A SentencePiece model with umT5's ids for pad, end and unknown."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


@pytest.fixture
def tokenizer_file(spiece: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "spiece.model"
    path.write_bytes(spiece)
    return path


def _hf() -> dict[str, Tensor]:
    names = module_names(LAYERS)
    official = load_file(MODEL)
    tensors = {f"{names[name.removesuffix('.weight')]}.weight": tensor for name, tensor in official.items()}
    assert {hf_to_official(name, LAYERS) for name in tensors} == set(official)
    return tensors


def _weights(encoder: TextEncoder) -> dict[str, Tensor]:
    return dict(encoder.model.state_dict())


def test_agrees_with_the_official_code(tokenizer_file: Path) -> None:
    golden = load_file(GOLDEN / "t5_encoder" / "io.safetensors")
    info = check_text_encoder_files([MODEL], [tokenizer_file])
    assert (info.dim, info.vocab, info.layers, info.heads) == (48, 300, 2, 4)
    encoder = load_text_encoder([MODEL], [tokenizer_file], dtype=torch.float32)
    assert encoder.dim == 48
    ids = golden["ids"][golden["mask"].bool()].tolist()
    out = encoder.encode_ids(ids)
    assert out.shape == golden["out"][0].shape and not out.requires_grad
    assert (out - golden["out"][0]).abs().max() / golden["out"].abs().max() < 1e-5


def test_padding_would_change_nothing(tokenizer_file: Path) -> None:
    golden = load_file(GOLDEN / "t5_encoder" / "io.safetensors")
    encoder = load_text_encoder([MODEL], [tokenizer_file], dtype=torch.float32)
    with torch.no_grad():
        padded = encoder.model(input_ids=golden["ids"], attention_mask=golden["mask"]).last_hidden_state[0, :11]
    assert (encoder.encode_ids(golden["ids"][0, :11].tolist()) - padded).abs().max() < 1e-5


def test_every_file_loads_to_the_same_tensors(spiece: bytes, tokenizer_file: Path, tmp_path: Path) -> None:
    official, hf = load_file(MODEL), _hf()
    piece = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    alias = dict(hf)
    alias["encoder.embed_tokens.weight"] = alias.pop("shared.weight")
    whole = hf | {"decoder.final_layer_norm.weight": torch.ones(48), "lm_head.weight": torch.ones(300, 48)}
    half = len(hf) // 2
    files: dict[str, dict[str, Tensor]] = {
        "comfy.safetensors": hf | piece,
        "alias.safetensors": alias | piece,
        "whole.safetensors": whole | piece,
        "prefixed.safetensors": {
            f"text_encoders.umt5xxl.transformer.{name}": tensor for name, tensor in (hf | piece).items()
        },
        "shard1.safetensors": dict(list(hf.items())[:half]),
        "shard2.safetensors": dict(list(hf.items())[half:]),
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    torch.save(official, tmp_path / "official.pth")
    expected = _weights(load_text_encoder([MODEL], [tokenizer_file], dtype=torch.float32))
    shards = ["shard1.safetensors", "shard2.safetensors"]
    for names in (*([name] for name in files if name not in shards), shards, ["official.pth"]):
        paths = [tmp_path / name for name in names]
        tokenizer = [] if names[0] not in (*shards, "official.pth") else [tokenizer_file]
        info = check_text_encoder_files(paths, tokenizer)
        assert info.layers == 2
        encoder = load_text_encoder(paths, tokenizer, dtype=torch.float32)
        assert encoder.tokenizer("a cat") == Tokenizer(spiece)("a cat")
        for name, tensor in _weights(encoder).items():
            assert torch.equal(tensor, expected[name]), (names, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_dtype_everywhere(dtype: torch.dtype, tokenizer_file: Path) -> None:
    encoder = load_text_encoder([MODEL], [tokenizer_file], dtype=dtype)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    embeddings = encoder.encode(["a cat", ""])
    assert [tensor.dtype for tensor in embeddings] == [dtype] * 2
    assert embeddings[0].shape[0] > 1 and embeddings[1].shape == (1, 48)
    assert all(tensor.isfinite().all() for tensor in embeddings)
    # One tensor behind both names of the embedding, not two copies.
    model = encoder.model
    assert model.shared.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_float8(scale_name: str, per_row: bool, spiece: bytes, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    expected: dict[str, Tensor] = {}
    for name, tensor in _hf().items():
        if "SelfAttention.q" in name or "wi_0" in name:
            scale = (tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()) / 448
            stored = (tensor / scale).to(torch.float8_e4m3fn)
            tensors |= {name: stored, f"{name.removesuffix('weight')}{scale_name}": scale}
            expected[name] = stored.float() * scale
        else:
            tensors[name] = tensor.to(torch.float8_e4m3fn) if "wi_1" in name else tensor
            expected[name] = tensors[name].float()
    tensors["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    path = tmp_path / "fp8.safetensors"
    save_file(tensors, path)
    assert check_text_encoder_files([path], []).spiece_model == "spiece_model"
    weights = _weights(load_text_encoder([path], dtype=torch.float32))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_unsupported_quantisation_is_named(spiece: bytes, tmp_path: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q"
    piece = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    path = tmp_path / "odd.safetensors"
    for extra, words in (
        ({f"{name}.weight": torch.zeros(48, 24, dtype=torch.uint8)}, f"stores {name}.weight as U8"),
        ({f"{name}.weight_scale": torch.ones(48, 2)}, f"scales {name}.weight in blocks"),
    ):
        save_file(_hf() | piece | extra, path)
        for attempt in (lambda: check_text_encoder_files([path], []), lambda: load_text_encoder([path])):
            with pytest.raises(ValueError, match=r"odd\.safetensors") as caught:
                attempt()
            assert words in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("dit_t2v/model/diffusion_pytorch_model.safetensors", "a Wan DiT checkpoint"),
        ("vae_wan21/vae/model.safetensors", "a Wan2.1 VAE"),
        ("README.md", "of an unknown format"),
        ("none.safetensors", "cannot be read"),
        ("none.pth", "cannot be read"),
    ],
)
def test_wrong_files_are_named(path: str, words: str, tokenizer_file: Path) -> None:
    file = GOLDEN / path
    for attempt in (check_text_encoder_files, load_text_encoder):
        with pytest.raises(ValueError, match="expected a umT5 text encoder") as caught:
            attempt([file], [tokenizer_file])
        assert str(file) in str(caught.value) and words in str(caught.value)


def test_incomplete_files_are_named(tokenizer_file: Path, tmp_path: Path) -> None:
    hf = _hf()
    t5 = {name: tensor for name, tensor in hf.items() if "1.layer.0.SelfAttention.relative" not in name}
    save_file({name: t for name, t in hf.items() if "final" not in name}, tmp_path / "lacking.safetensors")
    save_file(t5, tmp_path / "t5.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(MODEL.read_bytes()[:-100])
    torch.save(load_file(MODEL), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-100])
    for name, words in (
        ("lacking.safetensors", "a umT5 text encoder that lacks 1 tensors (encoder.final_layer_norm)"),
        ("t5.safetensors", "a T5 text encoder, not a umT5"),
        ("cut.safetensors", "is truncated"),
        ("cut.pth", "truncated or damaged"),
    ):
        for attempt in (check_text_encoder_files, load_text_encoder):
            with pytest.raises(ValueError, match="expected a umT5") as caught:
                attempt([tmp_path / name], [tokenizer_file])
            assert name in str(caught.value) and words in str(caught.value)


def test_tokenizer_is_found_or_asked_for(tokenizer_file: Path, spiece: bytes, tmp_path: Path) -> None:
    for attempt in (check_text_encoder_files, load_text_encoder):
        with pytest.raises(ValueError, match=r"carries no tokenizer.*google/umt5-xxl"):
            attempt([MODEL], [])
        with pytest.raises(ValueError, match=r"none/spiece\.model cannot be read"):
            attempt([MODEL], [tmp_path / "none" / "spiece.model"])
    official = tmp_path / "Wan2.2-T2V-A14B" / "models_t5_umt5-xxl-enc-bf16.pth"
    folder = official.parent / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    torch.save(load_file(MODEL), official)
    assert find_tokenizer_files(tmp_path / "elsewhere" / "x.pth") == ()
    (folder / "spiece.model").write_bytes(spiece)
    (folder / "tokenizer_config.json").write_text("{}")
    found = find_tokenizer_files(official)
    assert found == (folder / "spiece.model",)
    others = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    encoder = load_text_encoder([official], [*others, *found], dtype=torch.float32)
    assert encoder.encode(["a cat"])[0].shape[1] == 48


def test_a_carried_tokenizer_wins(spiece: bytes, tmp_path: Path) -> None:
    foreign = tmp_path / "tokenizer.json"
    foreign.write_text("{}")
    save_file(
        _hf() | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, tmp_path / "x.safetensors"
    )
    assert check_text_encoder_files([tmp_path / "x.safetensors"], [foreign]).spiece_model == "spiece_model"
    encoder = load_text_encoder([tmp_path / "x.safetensors"], [foreign])
    assert encoder.tokenizer("a cat") == Tokenizer(spiece)("a cat")


def test_foreign_tokenizers_are_named(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "spiece.model"):
        path = tmp_path / name
        path.write_bytes(b"<html>no</html>")
        with pytest.raises(ValueError, match="cannot be read as a tokenizer") as caught:
            load_text_encoder([MODEL], [path])
        assert str(path) in str(caught.value)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="empty file"):
            check_text_encoder_files([MODEL], [path])


def test_a_tokenizer_of_another_model_is_named(spiece: bytes, tokenizer_file: Path, tmp_path: Path) -> None:
    small = load_file(MODEL)
    small["token_embedding.weight"] = small["token_embedding.weight"][:20].clone()
    save_file(small, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="belong to different models"):
        load_text_encoder([tmp_path / "small.safetensors"], [tokenizer_file])


def test_both_tokenizer_formats_give_the_same_ids(spiece: bytes, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as JsonTokenizer
    from tokenizers import models, pre_tokenizers, processors

    pieces = SentencePieceProcessor(model_proto=spiece)
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    built = JsonTokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    built.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    built.enable_padding(length=600)
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    ours, theirs = Tokenizer(path), Tokenizer(spiece)
    assert ours.vocab == theirs.vocab
    for text in (*SENTENCES, "", "  grass &amp;amp; sun\n\nglasses ", "cat " * 700):
        assert ours(text) == theirs(text)
        assert ours(text)[-1] == 1


def test_umt5_xxl_has_242_tensors() -> None:
    assert len(module_names(24)) == 242


def test_long_prompts_are_cut_and_keep_their_end(spiece: bytes, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(spiece)
    ids = tokenizer("cat " * 1000)
    assert len(ids) == 512 and ids[-1] == 1 and 1 not in ids[:-1]
    assert "are cut" in caplog.text
    caplog.clear()
    assert len(tokenizer("cat")) < 512 and not caplog.records


def test_clean() -> None:
    assert clean("  a &amp;amp; b\t\n c  ") == "a & b c"
    assert clean("caf\u00c3\u00a9") == "caf\u00e9"
    assert clean("") == ""


def test_default_negative_prompt() -> None:
    assert DEFAULT_NEGATIVE_PROMPT.startswith("\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd")
    assert DEFAULT_NEGATIVE_PROMPT.endswith("\u5012\u7740\u8d70")
    assert len(DEFAULT_NEGATIVE_PROMPT.split("\uff0c")) == 28
