"""The refused half of the golden table: name -> (code, the whole sentence, what is pushed)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.artifact.cases import (
    GOOD,
    GOOD_WEIGHTS,
    PICKLE,
    Q0A,
    Q0B,
    Refused,
    added,
    all_int8,
    config,
    entry,
    filled,
    gpt2,
    header_file,
    make,
    mixed_dtypes,
    raw_config,
    renamed,
    weights,
    without,
)
from tests.generate import TINY_CONFIG, safetensors_bytes

PATH = "base_model.model.model."
FILES = GOOD.files
DUPLICATE = GOOD.config_bytes.replace(b'"r": 4', b'"r": 4, "r": 8')

# What the tenant reads, word for word; one line a case, so that a change of wording is seen in review.
SENTENCES: dict[str, str] = json.loads((Path(__file__).parent / "sentences.json").read_text())
REFUSED: dict[str, Refused] = {}


def case(name: str, code: str, files: dict[str, bytes], **options: object) -> None:
    assert name not in REFUSED, name
    REFUSED[name] = Refused(code=code, sentence=SENTENCES.get(name, ""), files=files, options=options)


case("pickled weights", "pickle", without(FILES, "adapter_model.safetensors") | {"adapter_model.bin": PICKLE})
case("pickle beside good weights", "pickle", FILES | {"training_args.BIN": PICKLE})
case("pickle under the right name", "pickle", weights(PICKLE))
case("zip under the right name", "pickle", weights(b"PK\x03\x04\x14\x00\x00\x00\x08\x08" + bytes(100)))
case("traversal upwards", "unsafe_path", FILES | {"../adapter_config.json": b"{}"})
case("traversal inside", "unsafe_path", FILES | {"a/../../etc/passwd": b"x"})
case("absolute path", "unsafe_path", FILES | {"/etc/passwd": b"x"})
case("backslashes", "unsafe_path", FILES | {"..\\adapter_config.json": b"{}"})
case("hidden file", "unsafe_path", FILES | {".gitattributes": b"x"})
case("NUL in a name", "unsafe_path", FILES | {"README.md\0.bin": b"x"})
case("newline at the end of a name", "unsafe_path", FILES | {"README.md\n": b"x"})
case("empty name", "unsafe_path", FILES | {"": b"x"})
case("endless name", "unsafe_path", FILES | {"a" * 300: b"x"})
case("a tokenizer", "unexpected_file", FILES | {"tokenizer.json": b"{}"})
case("a sub-folder", "unexpected_file", FILES | {"checkpoint-1/adapter_model.safetensors": GOOD_WEIGHTS})
case("config in capitals", "unexpected_file", FILES | {"ADAPTER_CONFIG.JSON": b"{}"})
case("no weights", "missing_file", without(FILES, "adapter_model.safetensors"))
case("no config", "missing_file", without(FILES, "adapter_config.json"))
case("nothing", "missing_file", {})
case("empty weights", "empty_file", weights(b""))
case("huge config", "file_too_large", raw_config(b" " * (2**18 + 1)))
case("huge readme", "file_too_large", FILES | {"README.md": b" " * (2**20 + 1)})

case("five bytes", "truncated", weights(b"12345"))
case("cut inside the header", "truncated", weights(GOOD_WEIGHTS[:100]))
case("cut inside the data", "truncated", weights(GOOD_WEIGHTS[:-1]))
case("header longer than the file", "truncated", weights((1000).to_bytes(8, "little") + b"{}"))
case("header bomb", "header_too_large", weights((2**63).to_bytes(8, "little") + b"{}"))
case("header of 2^64-1 bytes", "header_too_large", weights(b"\xff" * 8 + b"{}"))
case("header past the limit", "header_too_large", weights(header_file(b"{" + b" " * 2**22 + b"}")))
case("header is no JSON", "bad_header", weights(header_file(b"{not json}")))
case("header is a list", "bad_header", weights(header_file(b"[]")))
case("header begins with a space", "bad_header", weights(header_file(b" {}")))
case("header is empty", "bad_header", weights(header_file(b"")))
case("header is not UTF-8", "bad_header", weights(header_file(b'{"\xff": 1}')))
case("header says NaN", "bad_header", weights(header_file(b'{"a": NaN}')))
case("header nests for ever", "bad_header", weights(header_file(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}")))
case("header nests a little deep", "bad_header", weights(header_file(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}")))
case("half a surrogate pair", "bad_header", weights(header_file(b'{"\\ud800": {}}')))
case("number of ten thousand digits", "bad_header", weights(header_file(b'{"a": ' + b"9" * 10_000 + b"}")))
case("metadata is not strings", "bad_header", weights(header_file({"__metadata__": {"a": 1}})))
case("tensor stands twice", "duplicate_key", weights(header_file(b'{"a": {}, "a": {}}')))
case("key of an entry stands twice", "duplicate_key", weights(header_file(b'{"a": {"dtype": "F32", "dtype": "F32"}}')))
case("tensors overlap", "offsets_overlap", weights(header_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))))
case("tensors share all bytes", "offsets_overlap", weights(header_file({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8))))
case("gap between tensors", "offsets_gap", weights(header_file({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16))))
case("gap before the first", "offsets_gap", weights(header_file({"a": entry(4, 8)}, bytes(8))))
case("bytes after the last", "trailing_bytes", weights(GOOD_WEIGHTS + b"#!/bin/sh"))
case("unknown dtype", "unknown_dtype", weights(header_file({"a": entry(0, 4, dtype="F31")}, bytes(4))))
case("dtype is a list", "unknown_dtype", weights(header_file({"a": entry(0, 4) | {"dtype": []}}, bytes(4))))
case("negative offset", "bad_tensor_entry", weights(header_file({"a": entry(0, 4) | {"data_offsets": [-4, 0]}}, bytes(4))))
case("end before start", "bad_tensor_entry", weights(header_file({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, bytes(4))))
case("three offsets", "bad_tensor_entry", weights(header_file({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, bytes(4))))
case("offset past 2^63", "bad_tensor_entry", weights(header_file({"a": entry(0, 4) | {"data_offsets": [0, 2**64]}}, bytes(4))))
case("fractional shape", "bad_tensor_entry", weights(header_file({"a": entry(0, 4, shape=[1.0])}, bytes(4))))  # type: ignore[list-item]
case("shape of truth values", "bad_tensor_entry", weights(header_file({"a": entry(0, 4, shape=[True])}, bytes(4))))
case("negative shape", "bad_tensor_entry", weights(header_file({"a": entry(0, 4, shape=[-1, -1])}, bytes(4))))
case("shape that overflows", "bad_tensor_entry", weights(header_file({"a": entry(0, 4, shape=[2**40] * 2)}, bytes(4))))
case("a hundred dimensions", "bad_tensor_entry", weights(header_file({"a": entry(0, 4, shape=[1] * 100)}, bytes(4))))
case("shape and bytes disagree", "bad_tensor_entry", weights(header_file({"a": entry(0, 4, shape=[2])}, bytes(4))))
case("entry with a further key", "bad_tensor_entry", weights(header_file({"a": entry(0, 4) | {"strides": [1]}}, bytes(4))))
case("entry is a number", "bad_tensor_entry", weights(header_file({"a": 1})))

case("config is no JSON", "bad_json", raw_config(b"r: 4"))
case("config is a list", "bad_json", raw_config(b"[1]"))
case("config says Infinity", "bad_json", config(lora_alpha=float("inf")))
case("config says 1e999", "bad_json", raw_config(GOOD.config_bytes.replace(b'"lora_alpha": 8', b'"lora_alpha": 1e999')))
case("config with r twice", "duplicate_key", raw_config(DUPLICATE))
case("no peft_type", "missing_key", config(peft_type=...))
case("no r", "missing_key", config(r=...))
case("no lora_alpha", "missing_key", config(lora_alpha=None))
case("IA3", "unsupported_peft_type", config(peft_type="IA3"))
case("AdaLoRA", "unsupported_peft_type", config(peft_type="ADALORA"))
case("a kind that nobody knows", "unsupported_peft_type", config(peft_type="SUPERLORA"))
case("unknown key", "unknown_key", config(lora_gamma=3))
case("malformed key of the hub", "unknown_key", config(lora_r=4))
case("DoRA", "dora", config(use_dora=True))
case("DoRA in the tensors alone", "dora", added(f"{PATH}layers.0.self_attn.q_proj.lora_magnitude_vector", 64))
case("modules_to_save", "modules_to_save", config(modules_to_save=["lm_head"]))
case("modules_to_save in the tensors alone", "modules_to_save", added("base_model.model.lm_head.weight", 128, 64))
case("bias all", "bias", config(bias="all"))
case("bias lora_only", "bias", config(bias="lora_only"))
case("lora_bias", "bias", config(lora_bias=True))
case("bias in the tensors alone", "bias", added(f"{PATH}layers.0.self_attn.q_proj.lora_B.bias", 64))
for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"):
    case(f"init {init}", "init_changes_base", config(init_lora_weights=init))
case("init that nobody knows", "bad_value", config(init_lora_weights="magic"))
case("init is a number", "bad_value", config(init_lora_weights=1))
case("fan_in_fan_out", "fan_in_fan_out", config(fan_in_fan_out=True))
case("layer_replication", "layer_replication", config(layer_replication=[[0, 2], [1, 2]]))
case("trainable_token_indices", "trainable_tokens", config(trainable_token_indices=[5]))
case("new tokens in the tensors alone", "trainable_tokens", added(f"{PATH}embed_tokens.token_adapter.trainable_tokens_delta", 1, 64))
case("target_parameters", "target_parameters", config(target_parameters=["mlp.experts.gate_up_proj"]))
case("aLoRA", "alora", config(alora_invocation_tokens=[1, 2]))
case("QALoRA", "unsupported_variant", config(use_qalora=True))
case("BD-LoRA", "unsupported_variant", config(use_bdlora={"nblocks": 2}))
case("KaSA", "unsupported_variant", config(kasa_config={"a": 1}))
case("MonteCLoRA", "unsupported_variant", config(monteclora_config={"num_samples": 4}))
case("Arrow", "unsupported_variant", config(arrow_config={"top_k": 3}))
case("enable_lora of PEFT 0.2", "unsupported_variant", config(enable_lora=[True, False, True]))
case("KaSA in the tensors alone", "unsupported_variant", added(f"{PATH}layers.0.self_attn.q_proj.lora_diag", 4))
case("embeddings", "embeddings", added(f"{PATH}embed_tokens.lora_embedding_A", 4, 128))
case("r is a string", "bad_value", config(r="4"))
case("r is zero", "bad_value", config(r=0))
case("r is true", "bad_value", config(r=True))
case("lora_alpha is zero", "bad_value", config(lora_alpha=0))
case("lora_alpha is negative", "bad_value", config(lora_alpha=-8))
case("use_rslora is a string", "bad_value", config(use_rslora="yes"))
case("rank_pattern is a list", "bad_value", config(rank_pattern=[4]))
case("rank_pattern holds a string", "bad_value", config(rank_pattern={"q_proj": "4"}))
case("alpha_pattern holds null", "bad_value", config(alpha_pattern={"q_proj": None}))
case("no targets", "bad_value", config(target_modules=[]))
case("targets are numbers", "bad_value", config(target_modules=[1]))
case("base model is a list", "bad_value", config(base_model_name_or_path=[1]))
case("layers beside an expression", "bad_value", config(target_modules=".*_proj", layers_to_transform=[0]))
case("pattern is broken", "bad_pattern", config(alpha_pattern={"(q_proj": 1}))
case("target expression is broken", "bad_pattern", config(target_modules="*.q_proj"))
case("pattern refers back", "bad_pattern", config(alpha_pattern={r"(q)_\2roj": 1}))
case("pattern sets flags", "bad_pattern", config(target_modules="(?i).*_PROJ"))
case("pattern sets flags inside", "bad_pattern", config(target_modules=".*(?i:_PROJ)"))
case("pattern is atomic", "bad_pattern", config(target_modules="(?>.*_proj)"))
case("pattern is endless", "bad_pattern", config(target_modules="(a|b)" * 1000))
case("pattern nests for ever", "bad_pattern", config(target_modules="(" * 1000 + ")" * 1000))
case("pattern that takes for ever", "pattern_too_complex", config(alpha_pattern={"(.*)*" * 100 + str(n): 1 for n in range(100)}))

case("another base model", "wrong_base_model", config(base_model_name_or_path="meta-llama/Llama-3.1-8B"))
case("no base model named", "wrong_base_model", config(base_model_name_or_path=None))
case("targets of another architecture", "no_target_matches", gpt2())
case("no tensors at all", "no_target_matches", weights(header_file(b"{}")))
case("tensor of no target", "unmatched_tensor", renamed(Q0A, Q0A.replace("q_proj", "c_attn")))
case("target in the wrong block", "unmatched_tensor", renamed(Q0A, Q0A.replace("self_attn", "mlp")))
case("names without base_model.model.", "unmatched_tensor", renamed(Q0A, Q0A.removeprefix("base_model.model.")))
case("adapter named lora", "unmatched_tensor", renamed(Q0A, Q0A.replace(".weight", ".lora.weight")))
case("layer with leading zero", "unmatched_tensor", renamed(Q0A, Q0A.replace("layers.0", "layers.00")))
case("traversal in a tensor's name", "unmatched_tensor", renamed(Q0A, f"base_model.model.../../{Q0A}"))
case("control characters in a tensor's name", "unmatched_tensor", renamed(Q0A, "base_model.model.\x1b[2J.lora_A.weight"))
case("layer past the last", "layer_out_of_range", renamed(Q0A, Q0A.replace("layers.0", "layers.2")))
case("two names for one matrix", "duplicate_tensor", added(Q0A.replace("model.model.model.", "model.model."), 4, 64))
case("A without B", "missing_pair", GOOD.with_tensors(**{Q0B: ...}).files)
case("B without A", "missing_pair", GOOD.with_tensors(**{Q0A: ...}).files)
case("integers", "unsupported_dtype", weights(all_int8()))
case("two dtypes", "mixed_dtypes", weights(mixed_dtypes()))
case("A too wide", "wrong_shape", GOOD.with_tensors(**{Q0A: np.ones((4, 65), np.float32)}).files)
case("B too tall", "wrong_shape", GOOD.with_tensors(**{Q0B: np.ones((63, 4), np.float32)}).files)
case("A and B of different ranks", "wrong_shape", GOOD.with_tensors(**{Q0B: np.ones((64, 5), np.float32)}).files)
case("A transposed", "wrong_shape", GOOD.with_tensors(**{Q0A: np.ones((64, 4), np.float32)}).files)
case("A of one dimension", "wrong_shape", GOOD.with_tensors(**{Q0A: np.ones((256,), np.float32)}).files)
case("rank 0", "wrong_shape", GOOD.with_tensors(**{Q0A: np.ones((0, 64), np.float32), Q0B: np.ones((64, 0), np.float32)}).files)
case("of a wider base model", "wrong_shape", FILES, base_config=TINY_CONFIG | {"hidden_size": 128})
case("rank past the limit", "rank_too_large", make(rank=17).files)
case("rank of a pattern past the limit", "rank_too_large", make(rank_pattern={"q_proj": 17}).files)
case("r disagrees with the shapes", "rank_mismatch", config(r=8))
case("rank_pattern disagrees with the shapes", "rank_mismatch", config(rank_pattern={"v_proj": 2}))
case("rank_pattern forgotten", "rank_mismatch", make(rank_pattern={"q_proj": 7}).with_config(rank_pattern={}).files)
case("tensor outside target_modules", "tensor_not_targeted", config(target_modules=["q_proj", "k_proj"]))
case("tensor outside the expression", "tensor_not_targeted", config(target_modules=r".*\.[qk]_proj"))
case("target whose tensors are gone", "target_without_tensors", config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
case("target that the base lacks", "target_without_tensors", config(target_modules=["q_proj", "k_proj", "v_proj", "lm_head"]))

for dtype in ("F32", "F16", "BF16"):
    case(f"NaN in {dtype}", "not_finite", filled(float("nan"), dtype=dtype))
    case(f"infinity in {dtype}", "not_finite", filled(float("-inf"), dtype=dtype))
case("1e30", "weight_too_large", filled(1e30))
case("minus 1e30 in bf16", "weight_too_large", filled(-1e30, dtype="BF16"))
case("weights past the size limit", "file_too_large", FILES, weights_bytes=1000)
case("safetensors of another thing", "no_target_matches", weights(safetensors_bytes({"x": np.ones(3, np.float32)})))
