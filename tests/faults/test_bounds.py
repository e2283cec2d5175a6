"""How large the bounds are: what a release needs fits, and what would fill a machine does not.

The other tests ask of each bound only that it holds.
"""

from __future__ import annotations

import importlib

import pytest

MIB = 1 << 20
BOUNDS = {
    # 7 MB: umT5's vocabulary in a GGUF.
    "wan.files.headers.MAX_HEADER_BYTES": (8 * MIB, 32 * MIB),
    # 5,000: 14B with scales of 4-bit weights.
    "wan.files.headers.MAX_TENSORS": (8_000, 40_000),
    "wan.files.headers.MAX_PARTS": (60_000, 400_000),
    "wan.files.headers.MAX_NAME_LENGTH": (200, 1_000),
    "wan.files.headers.MAX_DIMS": (5, 64),
    "wan.files.headers.MAX_QUOTE": (200, 800),
    "wan.files.gguf_files.MAX_VALUES": (8_000, 40_000),
    # 256,384 pieces, each with a score and a kind.
    "wan.files.gguf_files.MAX_ITEMS": (300_000, 1_000_000),
    "wan.files.json_text.MAX_DEPTH": (5, 50),
    "wan.files.model_folder.MAX_JSON_BYTES": (MIB // 2, 8 * MIB),
    "wan.files.model_folder.MAX_SHARDS": (12, 512),
    "wan.files.pth_files.MAX_INDEX_BYTES": (MIB // 4, 2 * MIB),
    "wan.files.pth_files.MAX_OPCODES": (50_000, 500_000),
    "wan.files.pth_files.MAX_DIRECTORY_BYTES": (MIB // 4, 2 * MIB),
    "wan.files.quant_formats.MAX_TENSOR_BYTES": (128, 4096),
    "wan.text.tokenizer_bounds.MAX_JSON_BYTES": (17 * MIB, 64 * MIB),
    "wan.text.tokenizer_bounds.MAX_SPIECE_BYTES": (5 * MIB, 16 * MIB),
    "wan.text.tokenizer_bounds.MAX_PIECES": (256_384, 1_000_000),
    "wan.lora.alpha.MAX_CONFIG_BYTES": (10_000, 4 * MIB),
    "wan.model.config.MAX_SIZE": (20_000, 2_000_000),
    "wan.model.config.MAX_LAYERS": (40, 2_000),
    "distributed.job.json_files.MAX_JSON_BYTES": (MIB, 8 * MIB),
    "distributed.job.model_files.MAX_FILES": (64, 512),
    "distributed.group.last_words.MAX_BYTES": (MIB, 8 * MIB),
    "distributed.group.logs.MAX_BACKLOG": (64 << 10, 4 * MIB),
    "distributed.group.logs.MAX_LINE": (500, 8_000),
    "distributed.hosts.hostfile.MAX_HOSTFILE_BYTES": (4_000, MIB),
    "distributed.launch.launcher.MAX_LOG": (16 << 10, MIB),
    "distributed.launch.launcher.MAX_PREVIEW": (MIB, 16 * MIB),
    "nodes.models.model_paths.MAX_PATH_LENGTH": (1024, 8192),
    "nodes.host.request_body.MAX_BODY": (4096, MIB),
    "nodes.batch.requests.MAX_VIDEOS": (100, 1000),
}
"""Bound -> the least and the most that it may be."""


@pytest.mark.parametrize("name", BOUNDS)
def test_fault_35_a_bound_is_of_its_size(name: str):
    module, _, bound = name.rpartition(".")
    least, most = BOUNDS[name]
    assert least <= getattr(importlib.import_module(f"wan_pack.{module}"), bound) <= most
