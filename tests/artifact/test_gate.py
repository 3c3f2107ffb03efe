"""The golden table: what the gate takes, with its scales and ranks, and what it refuses, word for word."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest

from registry.artifact.errors import CODES, ArtifactRefused
from registry.artifact.gate import check_push
from registry.artifact.lora import parse_config
from tests.artifact.cases import ACCEPTED, ACCEPTED_BEYOND_PEFT, BASE, GOOD, GOOD_WEIGHTS, Refused
from tests.artifact.judge import judge
from tests.artifact.refused import REFUSED, SENTENCES
from tests.generate import BASE_NAME, TARGETS, GeneratedAdapter, decode, generate_adapter

TAKEN = ACCEPTED | ACCEPTED_BEYOND_PEFT
# Codes about base models and manifests, which no push can meet: test_base.py and test_manifest.py.
OTHER_CODES = {"unsupported_base_model", "bad_base_model", "bad_manifest"}


@pytest.mark.parametrize("adapter", TAKEN.values(), ids=TAKEN)
def test_accepted(adapter: GeneratedAdapter) -> None:
    accepted, report = judge(adapter.files)
    values = adapter.tensors
    data = adapter.weights_bytes[accepted.header.data_start :]
    assert len(accepted.layout.pairs) * 2 == len(values)
    assert accepted.num_params == report.num_values == sum(array.size for array in values.values())
    assert report.max_abs == max(float(np.abs(array).max()) for array in values.values())
    for pair in accepted.layout.pairs:
        for tensor in (pair.a, pair.b):
            stored = decode(data[tensor.start : tensor.end], accepted.layout.dtype).reshape(tensor.shape)
            assert np.array_equal(stored, values[tensor.name])
        assert pair.a.shape == (pair.rank, BASE.targets[pair.target][0])
        assert pair.b.shape == (BASE.targets[pair.target][1], pair.rank)
        assert f"layers.{pair.layer}." in pair.a.name
        assert f".{pair.target}." in pair.a.name


@pytest.mark.parametrize("name", [name for name in TAKEN if "memory" not in name and "absent" not in name])
def test_scale_is_peft_s_by_an_independent_reading(name: str) -> None:
    accepted, _ = judge(TAKEN[name].files)
    for pair in accepted.layout.pairs:
        assert pair.scale == pytest.approx(TAKEN[name].scale(pair.layer, pair.target), rel=1e-12)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case: Refused) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        judge(case.files, **case.options)
    assert (refused.value.code, refused.value.detail) == (case.code, case.sentence)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refusals_name_field_and_remedy_and_are_safe_to_show(case: Refused) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        judge(case.files, **case.options)
    error = refused.value
    assert error.detail.startswith(f"{error.field}: ")
    assert error.detail.endswith(f"; {error.remedy}")
    assert error.detail.isascii()
    assert error.detail.isprintable()
    assert len(error.detail) < 600
    assert error.value is None or (error.value.isprintable() and len(error.value) <= 200)


def test_every_code_has_a_case() -> None:
    assert {case.code for case in REFUSED.values()} | OTHER_CODES == set(CODES)
    assert set(SENTENCES) == set(REFUSED)


def test_layout_order_and_summary() -> None:
    adapter = generate_adapter(BASE, targets=tuple(reversed(TARGETS)), rank_pattern={"down_proj": 9})
    accepted, _ = judge(adapter.files)
    assert [(pair.layer, pair.target) for pair in accepted.layout.pairs] == [(layer, t) for layer in (0, 1) for t in TARGETS]
    assert accepted.targets == TARGETS
    assert accepted.rank == 9
    assert accepted.layout.dtype == "F32"


def test_readme_is_taken() -> None:
    judge(GOOD.files | {"README.md": b"# mine"})


def test_a_push_that_names_its_base_is_judged_by_shapes() -> None:
    config = GOOD.with_config(base_model_name_or_path="./out/checkpoint-7").config_bytes
    files = {"adapter_config.json": len(config), "adapter_model.safetensors": len(GOOD_WEIGHTS)}
    options = {"weights_size": len(GOOD_WEIGHTS), "base": BASE, "max_rank": 16}
    check_push(files, config=config, weights=io.BytesIO(GOOD_WEIGHTS), base_names=(), **options)
    with pytest.raises(ArtifactRefused, match="checkpoint-7"):
        check_push(files, config=config, weights=io.BytesIO(GOOD_WEIGHTS), base_names=[BASE_NAME], **options)


def test_hostile_config_is_answered_quickly() -> None:
    slow = {"(.*)*" * 100 + str(n): 1 for n in range(100)} | {"((a+)+)+" + str(n): 1 for n in range(100)}
    started_s = time.process_time()
    with pytest.raises(ArtifactRefused, match="takes too long"):
        judge(GOOD.with_config(alpha_pattern=slow).files)
    assert time.process_time() - started_s < 10


def test_config_keeps_what_callers_need() -> None:
    config = parse_config(GOOD.with_config(revision="abc").config_bytes)
    assert (config.base_model_name, config.revision) == (BASE_NAME, "abc")
    assert json.loads(GOOD.config_bytes)["r"] == config.r
