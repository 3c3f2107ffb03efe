"""PEFT and transformers, unchanged: `HF_ENDPOINT` and `HF_TOKEN` in the environment, `tenant/adapter` for a name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.hub.conftest import token_of
from tests.tiny import make_tiny_model

# Prints the largest difference between the delta that PEFT applies and scale * B @ A of the pushed adapter.
SCRIPT = """
import sys
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, expected = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "acme/tiny-adapter")
layer = model.base_model.model.model.layers[1].self_attn.v_proj
print(float(np.abs(layer.get_delta_weight("default").detach().numpy() - np.load(expected)).max()))
"""


def test_an_adapter_loads_by_its_repository_id(acme: Pusher, work: Callable[[], int], server_url: str, tmp_path: Path) -> None:
    made = adapter(5, targets=("q_proj", "v_proj"))
    assert acme.push("tiny-adapter", made).status_code == 201
    assert work() == 1
    base = make_tiny_model(tmp_path / "base")  # of the shapes that the adapter was made for
    np.save(tmp_path / "delta.npy", made.delta(1, "v_proj"))
    environment = {"HF_ENDPOINT": server_url, "HF_TOKEN": token_of(acme), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(tmp_path / "delta.npy")],
        env=os.environ | environment | {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-6
