"""What an adapter is on disk, in one place: digests, manifests, the safetensors header, the LoRA layout, the gate.

Needs the standard library and numpy only. The registry decides with it at push; the runtime reads with it at load.
"""
