"""Models of the river library as detectors of anomalies, where the extra `river` is installed.

A model is given what is left of a reading after its series' median and spread (domain/quality/anomaly.py), in robust standard deviations, and
gives a score of its own scale. Each series has a model of its own, kept in the series' state as text: a pickle, of which only
the classes that these models are made of are loaded, since state comes from a Kafka topic that others might write to.
"""

import io
import pickle
from base64 import b85decode, b85encode
from collections.abc import Mapping
from typing import Any, Final

from preservarium.errors import Fatal

#: Text of one series' model. Half-space trees of ten trees of height six have some 57,000;
MODEL_CHARS_MAX: Final = 65_536

#: Series of one device that have a model: at their largest, half of what a record of the state's changelog may have.
MODELS_PER_DEVICE_MAX: Final = 8

#: How far off a reading may stand before it is all the same to a model; half-space trees need bounds.
_REST_MAX: Final = 20.0

#: Modules whose classes a model's pickle may name; of builtins and others, only these names.
_MODULES: Final = (
    "river.anomaly.",
    "river.proba.",
    "river.stats.",
    "river.tree.",
    "river.optim.",
    "river._river_rust.",
)
_NAMES: Final = frozenset(
    {("builtins", "tuple"), ("functools", "partial"), ("collections", "defaultdict"), ("random", "Random")}
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES or f"{module}.".startswith(_MODULES):
            return super().find_class(module, name)
        message = f"the state of a model names {module}.{name}"
        raise Fatal(message)


class RiverModel:
    """One series' model.

    Args:
        name: of the class in `river.anomaly` (domain/quality/anomaly.py lists those that there are).
        parameters: of its constructor.
        text: what `dump` gave; "" for a model that has learnt nothing.

    Raises:
        ImportError: the extra `river` is not installed.
        ValueError: a parameter cannot be used.
        Fatal: the text is no model's.
    """

    def __init__(self, name: str, parameters: Mapping[str, Any], text: str = "") -> None:
        self._of_value = name in ("GaussianScorer", "StandardAbsoluteDeviation")
        if text:
            self._model = _Unpickler(io.BytesIO(b85decode(text))).load()
            return
        try:
            from river import anomaly
        except ImportError:
            message = "river is not installed: pip install 'preservarium[river]'"
            raise ImportError(message) from None
        # The same readings give the same scores, here and after a crash.
        given = {"seed": 1, "limits": {"rest": (-_REST_MAX, _REST_MAX)}} if name == "HalfSpaceTrees" else {}
        try:
            self._model = getattr(anomaly, name)(**{**given, **parameters})
        except (TypeError, ValueError) as e:
            message = f"{name}: {e}"
            raise ValueError(message) from None

    def score(self, rest: float) -> float:
        """Score of a reading, `rest` robust standard deviations off its series' median; then learn it."""
        rest = max(-_REST_MAX, min(_REST_MAX, rest))
        if self._of_value:
            score = self._model.score_one(None, rest)
            self._model.learn_one(None, rest)
        else:
            score = self._model.score_one({"rest": rest})
            self._model.learn_one({"rest": rest})
        return float(score)

    def dump(self) -> str:
        """The model as text.

        Raises:
            ValueError: it has grown beyond `MODEL_CHARS_MAX`.
        """
        text = b85encode(pickle.dumps(self._model, 5)).decode()
        if len(text) > MODEL_CHARS_MAX:
            message = f"a model of {len(text)} characters; it may have {MODEL_CHARS_MAX}"
            raise ValueError(message)
        return text
