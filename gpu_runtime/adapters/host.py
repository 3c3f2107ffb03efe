"""The host tier: ready page images by (tenant, form digest), least recently used first out. Step thread only."""

from __future__ import annotations

from collections import Counter, OrderedDict

from gpu_runtime.adapters.image import AdapterImage
from gpu_runtime.core import AdapterKey


class HostCache:
    """Keeps at most `max_bytes` of images, not counting what is wanted: an image that a queued request waits for stays.

    `pinned_bytes` is what such images take; residency starts no further pulls while it is at the budget, which bounds the
    overshoot by the pulls in flight.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._images: OrderedDict[AdapterKey, AdapterImage] = OrderedDict()
        self._pins: Counter[AdapterKey] = Counter()
        self._num_bytes = 0
        self.pinned_bytes = 0

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._images

    def keys(self) -> tuple[AdapterKey, ...]:
        return tuple(self._images)

    def get(self, key: AdapterKey) -> AdapterImage | None:
        """The image, now the most recently used."""
        if key in self._images:
            self._images.move_to_end(key)
        return self._images.get(key)

    def peek(self, key: AdapterKey) -> AdapterImage | None:
        """The image, without a use."""
        return self._images.get(key)

    def put(self, key: AdapterKey, image: AdapterImage) -> None:
        """Keep `image`, evicting others where the budget asks for it."""
        self.drop(key)
        self._images[key] = image
        self._num_bytes += image.num_bytes
        if self._pins[key]:
            self.pinned_bytes += image.num_bytes
        self._shrink()

    def pin(self, key: AdapterKey) -> None:
        """One more request waits for this image, present or still to come."""
        self._pins[key] += 1
        if self._pins[key] == 1 and key in self._images:
            self.pinned_bytes += self._images[key].num_bytes

    def unpin(self, key: AdapterKey) -> None:
        assert self._pins[key] > 0, f"{key} is unpinned more often than pinned"
        self._pins[key] -= 1
        if self._pins[key] == 0:
            del self._pins[key]
            if key in self._images:
                self.pinned_bytes -= self._images[key].num_bytes
            self._shrink()

    def num_pins(self, key: AdapterKey) -> int:
        return self._pins.get(key, 0)

    def drop(self, key: AdapterKey) -> None:
        """Forget an image; its pins stay, they belong to the waiting."""
        image = self._images.pop(key, None)
        if image is not None:
            self._num_bytes -= image.num_bytes
            if self.num_pins(key):
                self.pinned_bytes -= image.num_bytes

    def _shrink(self) -> None:
        for key in list(self._images):
            if self._num_bytes <= self.max_bytes:
                return
            if not self.num_pins(key):
                self.drop(key)

    def check_integrity(self) -> None:
        """The counts are the sums, and unpinned images keep the budget."""
        total = sum(image.num_bytes for image in self._images.values())
        pinned = sum(image.num_bytes for key, image in self._images.items() if self.num_pins(key))
        assert total == self._num_bytes, f"counted {self._num_bytes} bytes, there are {total}"
        assert pinned == self.pinned_bytes, f"counted {self.pinned_bytes} pinned bytes, there are {pinned}"
        assert total <= max(self.max_bytes, pinned), f"{total} bytes are kept, the budget is {self.max_bytes}"
