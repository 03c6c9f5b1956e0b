"""The same text as the standard library's."""

import json

from awqkit.checkpoint.indented_json import indented_json


def test_text_is_that_of_the_standard_library() -> None:
    value = {
        "words": {"a": 'é "quoted"\n', "b": None, "é": True},
        "numbers": [1, 2.5, 1e-30, float("nan"), -0.0],
        "empty": [{}, [], (), ""],
        "nested": [[1, [2, 3]], {"c": (4, {"d": 5})}],
        7: {None: [0], 1.5: 0},
    }

    for each in (value, [], {}, 3, "word", [value, value]):
        assert indented_json(each) == json.dumps(each, indent=2, ensure_ascii=False)
