#!/usr/bin/env bash
# Guess: T5Tokenizer(vocab_file="spiece.model") loads the vocabulary, as it did for years, or raises where it cannot.
# Seen, transformers 5.24.0: it does neither. The argument is taken and not used: the tokenizer knows its special tokens
# and nothing else, and every word of every prompt becomes <unk>, without a warning. from_pretrained on the folder is right,
# if protobuf is there.
# Costs: every prompt of the same number of words gives the same video, which has nothing to do with any of them.
# Here: spiece.model is read by sentencepiece, tokenizer.json by tokenizers (wan/text/tokenizer.py).
#
# Output on 2026-11-28:
#   transformers 5.24.0
#   'a red fox', right: [14, 3, 7, 4, 20, 11, 27, 1], from_pretrained: [14, 3, 7, 4, 20, 11, 27, 1]
#     vocab_file: ['▁', '<unk>', '▁', '<unk>', '▁', '<unk>', '</s>']
#   'the slow snow', right: [8, 4, 13, 12, 13, 25, 15, 1], from_pretrained: [8, 4, 13, 12, 13, 25, 15, 1]
#     vocab_file: ['▁', '<unk>', '▁', '<unk>', '▁', '<unk>', '</s>']
#   vocabulary: 31 pieces, of which vocab_file has 4
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2
    python="$work/venv/bin/python"
fi
cat > "$work/finding.py" <<'PYTHON'
import json
import os
import shutil
import warnings

import sentencepiece
import transformers
from transformers import T5Tokenizer

with open("text", "w") as file:
    file.write("a red fox walks through the snow\nthe camera follows it slowly at sunrise\n" * 50)
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="spiece", vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    hard_vocab_limit=False,
)
right = sentencepiece.SentencePieceProcessor(model_file="spiece.model")
os.mkdir("folder")
shutil.copy("spiece.model", "folder")
with open("folder/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}, file)

print("transformers", transformers.__version__)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    by_file = T5Tokenizer(vocab_file="spiece.model", extra_ids=0)
by_folder = T5Tokenizer.from_pretrained("folder")
texts = ("a red fox", "the slow snow")
for text in texts:
    print(f"{text!r}, right: {right.encode(text) + [1]}, from_pretrained: {by_folder(text).input_ids}")
    print("  vocab_file:", by_file.convert_ids_to_tokens(by_file(text).input_ids))
    assert by_folder(text).input_ids == right.encode(text) + [1]
    assert set(by_file.convert_ids_to_tokens(by_file(text).input_ids)) == {"\u2581", "<unk>", "</s>"}
assert by_file(texts[0]).input_ids == by_file(texts[1]).input_ids
print("vocabulary:", len(right), "pieces, of which vocab_file has", len(by_file))
PYTHON
cd "$work"
"$python" -W ignore finding.py
