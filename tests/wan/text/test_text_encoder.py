"""The text encoder against the official code's output, and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from umt5 import MODEL, SENTENCES, hf_weights, train_spiece
from wan_pack.wan.text.t5_keys import check_text_encoder_files, module_names
from wan_pack.wan.text.text_encoder import DEFAULT_NEGATIVE_PROMPT, load_text_encoder
from wan_pack.wan.text.tokenizer import Tokenizer, clean
from wan_pack.wan.text.tokenizer_files import find_tokenizer_files


@pytest.fixture
def spiece() -> bytes:
    return train_spiece()


@pytest.fixture
def tokenizer_file(spiece: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "spiece.model"
    path.write_bytes(spiece)
    return path


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
        hf_weights() | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)},
        tmp_path / "x.safetensors",
    )
    assert check_text_encoder_files([tmp_path / "x.safetensors"], [foreign]).spiece_model == "spiece_model"
    encoder = load_text_encoder([tmp_path / "x.safetensors"], [foreign])
    assert encoder.model.dtype == torch.bfloat16, "as the official code has it"
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


def test_long_prompts_are_cut_and_keep_their_end(spiece: bytes) -> None:
    tokenizer = Tokenizer(spiece)
    ids = tokenizer("cat " * 1000)
    assert len(ids) == 512 and ids[-1] == 1 and 1 not in ids[:-1]
    assert tokenizer.notes(prompt="cat " * 1000, negative_prompt="cat") == [
        f"prompt has {length(tokenizer, 1000)} tokens; it was cut to 512, which is what the model takes"
    ]
    # The end of the text takes the last place.
    fitting = next(count for count in range(1, 1000) if length(tokenizer, count + 1) > 512)
    assert tokenizer.notes(prompt="cat " * fitting) == []
    assert len(tokenizer.notes(prompt="cat " * (fitting + 1))) == 1


def length(tokenizer: Tokenizer, words: int) -> int:
    return len(tokenizer._pieces.encode(("cat " * words).strip())) + 1


def test_clean() -> None:
    assert clean("  a &amp;amp; b\t\n c  ") == "a & b c"
    assert clean("caf\u00c3\u00a9") == "caf\u00e9"
    assert clean("") == ""


def test_default_negative_prompt() -> None:
    assert DEFAULT_NEGATIVE_PROMPT.startswith("\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd")
    assert DEFAULT_NEGATIVE_PROMPT.endswith("\u5012\u7740\u8d70")
    assert len(DEFAULT_NEGATIVE_PROMPT.split("\uff0c")) == 28
