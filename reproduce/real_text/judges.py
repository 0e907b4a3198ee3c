"""The reward (VADER, a lexicon of sentiment) and the judge (TextBlob's, another one, which nothing is trained on)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from saffron.models.chat import Conversation


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score of a text, from -1 to 1."""
    return float(_analyzer().polarity_scores(text)["compound"])


def vader(conversations: Sequence[Conversation], responses: Sequence[str]) -> list[float]:
    """The process reward: `min(0, compound)` of the response so far. Nothing is gained by being nicer than neutral."""
    return [min(0.0, sentiment(response)) for response in responses]


def judged(text: str) -> float:
    """TextBlob's polarity, from -1 to 1. Its lexicon (Pattern's) needs no corpora."""
    from textblob import TextBlob

    return float(TextBlob(text).sentiment.polarity)
