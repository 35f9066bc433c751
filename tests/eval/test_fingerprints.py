"""The key under which a response is cached depends on everything that determines it."""

import os
from dataclasses import replace

from owl2.eval.fingerprints import cache_key


def test_cache_key_depends_on_the_sample_and_the_image_file(questions, tmp_path, images):
    sample = questions[0]
    path = tmp_path / "a.png"
    path.write_bytes((images / "red.png").read_bytes())
    image = {"type": "image", "path": str(path)}
    own = replace(sample, messages=[{"role": "user", "content": [image]}])
    keys = {
        cache_key(own),
        cache_key(sample),
        cache_key(replace(own, id="other")),
        cache_key(replace(own, metadata={"a": 1})),
        cache_key(replace(own, expected=("other",))),
    }
    assert len(keys) == 5
    assert cache_key(own) in keys
    os.utime(path, (1, 1))
    assert cache_key(own) not in keys
