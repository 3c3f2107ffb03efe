"""Why an artifact is refused: one exception, one stable code for each kind of refusal."""

from __future__ import annotations

CODES: dict[str, str] = {
    # files of a push
    "unsafe_path": "a file name that leaves its folder or holds odd characters",
    "pickle": "weights that would run code when opened",
    "unexpected_file": "a file that is no part of an adapter",
    "missing_file": "adapter_config.json or adapter_model.safetensors is absent",
    "file_too_large": "a file is past its size limit",
    "empty_file": "a file without bytes",
    # safetensors header
    "truncated": "the file ends before its header or its tensors do",
    "header_too_large": "the header is past its limit or past the file",
    "bad_header": "the header is not a safetensors header",
    "duplicate_key": "a JSON key stands twice in one object",
    "bad_tensor_entry": "a tensor's dtype, shape or offsets cannot be",
    "unknown_dtype": "a dtype that safetensors does not define",
    "offsets_overlap": "two tensors share bytes",
    "offsets_gap": "bytes that belong to no tensor",
    "trailing_bytes": "bytes after the last tensor",
    # adapter_config.json
    "bad_json": "not a JSON object in UTF-8",
    "missing_key": "a key without which the adapter has no meaning",
    "unknown_key": "a key that this version does not know",
    "bad_value": "a value of the wrong kind or out of range",
    "unsupported_peft_type": "not a LoRA adapter",
    "dora": "DoRA: not linear in the weights",
    "modules_to_save": "full weights beside the LoRA",
    "bias": "trained biases",
    "init_changes_base": "an initialisation that changed the base weights",
    "fan_in_fan_out": "trained on transposed (Conv1D) weights",
    "layer_replication": "changes the number of layers",
    "trainable_tokens": "changes rows of the embedding",
    "target_parameters": "LoRA on bare parameters (experts)",
    "alora": "active only after certain tokens",
    "unsupported_variant": "a LoRA variant whose delta is not scale * B @ A",
    "embeddings": "LoRA on embeddings",
    "bad_pattern": "a regular expression that cannot be used",
    "pattern_too_complex": "a regular expression that takes too long",
    # config, header and base model together
    "wrong_base_model": "trained on another base model",
    "no_target_matches": "no tensor belongs to a target of the base model",
    "unmatched_tensor": "a tensor that no target takes",
    "layer_out_of_range": "a tensor of a layer that the base model does not have",
    "duplicate_tensor": "two tensors for one place",
    "missing_pair": "A without B, or B without A",
    "unsupported_dtype": "weights that are not f32, f16 or bf16",
    "mixed_dtypes": "weights of more than one dtype",
    "wrong_shape": "a shape that does not fit the base model",
    "rank_mismatch": "the config says another rank than the tensors",
    "rank_too_large": "past the rank limit",
    "tensor_not_targeted": "a tensor that target_modules leaves out",
    "target_without_tensors": "an entry of target_modules without tensors",
    # values
    "not_finite": "NaN or infinity among the weights",
    "weight_too_large": "a weight past the bound",
    # base models and manifests
    "unsupported_base_model": "a base model of a family that is not served",
    "bad_base_model": "a base model folder that lacks something",
    "bad_manifest": "a manifest that is not one of ours",
}


class ArtifactRefused(ValueError):
    """An artifact cannot be taken.

    `code` is one of CODES. `detail` is one sentence that names the field, the value and the remedy; `field`, `value`
    (printable, at most 200 characters) and `remedy` are the same for machines.
    """

    def __init__(self, code: str, problem: str, *, remedy: str, field: str, value: object = None) -> None:
        assert code in CODES, f"undeclared refusal code {code}"
        self.code = code
        self.field = field
        self.value = None if value is None else printable(value)
        self.remedy = remedy
        self.detail = f"{field}: {problem}; {remedy}"
        super().__init__(self.detail)


def printable(value: object) -> str:
    """At most 200 printable ASCII characters of a value that a stranger chose, safe in logs and terminals."""
    text = value if isinstance(value, str) else repr(value)
    return "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in text[:200])[:200]
