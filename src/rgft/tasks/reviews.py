"""Snippets of reviews, news and tweets with the mean of twenty human ratings of their sentiment.

Source: the data of Hutto and Gilbert, "VADER: A parsimonious rule-based model for sentiment
analysis of social media text", ICWSM 2014, as carried by the source distribution of vaderSentiment
3.3.2 (MIT licence). Ratings run from -4 (extremely negative) to 4 (extremely positive).

Film reviews are split into training, validation and test; Amazon reviews, newspaper editorials and
tweets are further test sets, to see what a model makes of other domains. About seven in ten film
snippets are also sentences of SST-2, so neither task is a clean test for a model trained on the
other.
"""

from __future__ import annotations

import html
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rgft.errors import InputError
from rgft.tasks.archive import checked, download_source, read_members
from rgft.tasks.cache import Row, cache_home, store, store_splits, stored_splits
from rgft.tasks.splitting import unit_hash
from rgft.tasks.task import TaskData, split_in_memory

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
NEUTRAL = 0.5
"""Ratings closer to 0 than this are left out of the classification task."""

_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_DOMAINS = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "newspaper": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
_LARGEST = 4 << 20  # bytes; the largest member has 1.4 MB
_SPLITS = ("train", "validation", "test", "amazon", "newspaper", "tweets")
_VERSION = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParsedReviews:
    """The data, parsed and split.

    Attributes:
        splits: Rows with "text" and "rating" by split name.
        counts: By domain: rows read, malformed rows left out, duplicates left out.
    """

    splits: Mapping[str, list[Row]]
    counts: Mapping[str, Mapping[str, int]]


def load_reviews(data: Path | None = None) -> TaskData:
    """Sentiment, positive or negative; rows rated closer to 0 than `NEUTRAL` are left out.

    Args:
        data: Folder that holds the archive; by default it comes from the cache, or through pip.

    Raises:
        InputError: The archive can be neither found nor fetched, or is damaged.
    """
    clear = {
        name: [(text, rating) for text, rating in rows if abs(rating) >= NEUTRAL]
        for name, rows in _ratings(data).items()
    }
    return TaskData(
        name="reviews",
        kind="classification",
        input_columns=("text",),
        label_column="label",
        label_names=("negative", "positive"),
        metric="accuracy",
        splits={
            name: split_in_memory(
                {"text": [text for text, _ in rows]}, "label", [int(r > 0) for _, r in rows]
            )
            for name, rows in clear.items()
        },
    )


def load_ratings(data: Path | None = None) -> TaskData:
    """The mean rating itself, from -4 to 4, as a regression over all rows.

    Args:
        data: Folder that holds the archive; by default it comes from the cache, or through pip.

    Raises:
        InputError: The archive can be neither found nor fetched, or is damaged.
    """
    return TaskData(
        name="reviews-rating",
        kind="regression",
        input_columns=("text",),
        label_column="rating",
        label_names=(),
        metric="pearson",
        splits={
            name: split_in_memory(
                {"text": [text for text, _ in rows]}, "rating", [rating for _, rating in rows]
            )
            for name, rows in _ratings(data).items()
        },
    )


def is_available() -> bool:
    """Whether the task can be loaded without the network."""
    folder = _folder()
    return (
        stored_splits(folder, _SPLITS, _VERSION) is not None or _stored_archive(folder) is not None
    )


def parse_archive(archive: bytes) -> ParsedReviews:
    """Read the four rated files inside the source distribution, and split them.

    A text that occurred before, in whichever file, is dropped: film reviews come first, so that
    no text of another domain is one that was trained on. Which split a film review belongs to
    depends on the hash of its text alone.

    Raises:
        InputError: The archive is not the one expected.
    """
    inner = read_members(archive, {_INNER: 2 * _LARGEST}, ARCHIVE)[_INNER]
    files = read_members(inner, dict.fromkeys(_DOMAINS.values(), _LARGEST), Path(_INNER).name)
    splits: dict[str, list[Row]] = {name: [] for name in _SPLITS}
    counts: dict[str, Counter[str]] = {}
    seen: set[str] = set()
    for domain, member in _DOMAINS.items():
        counts[domain] = Counter(rows=0, malformed=0, duplicates=0)
        for line in files[member].decode("utf-8").split("\n"):
            if not line.strip():
                continue
            counts[domain]["rows"] += 1
            row = _parse_line(line)
            if row is None:
                counts[domain]["malformed"] += 1
            elif row[0] in seen:
                counts[domain]["duplicates"] += 1
            else:
                seen.add(row[0])
                split = domain if domain != "movie" else _movie_split(row[0])
                splits[split].append({"text": row[0], "rating": row[1]})
    return ParsedReviews(splits, counts)


def _parse_line(line: str) -> tuple[str, float] | None:
    """Text and rating of `id <tab> rating <tab> text`; None for anything else."""
    fields = line.split("\t")
    if len(fields) != 3:
        return None
    # some entities were escaped twice: &amp;amp; and &amp;#38;
    text = html.unescape(html.unescape(fields[2])).strip()
    try:
        rating = float(fields[1])
    except ValueError:
        return None
    return (text, rating) if text and math.isfinite(rating) and abs(rating) <= 4 else None


def _movie_split(text: str) -> str:
    place = unit_hash(text)
    if place < 0.8:
        return "train"
    return "validation" if place < 0.9 else "test"


def _ratings(data: Path | None) -> dict[str, list[tuple[str, float]]]:
    rows = _stored_rows() if data is None else parse_archive(_archive_in(data)).splits
    return {
        name: [(str(row["text"]), cast(float, row["rating"])) for row in rows[name]]
        for name in _SPLITS
    }


def _stored_rows() -> Mapping[str, list[Row]]:
    """The parsed splits from the cache, which is built, or mended, first if need be."""
    folder = _folder()
    splits = stored_splits(folder, _SPLITS, _VERSION)
    if splits is not None:
        return splits
    archive = _stored_archive(folder)
    if archive is None:
        archive = download_source(REQUIREMENT, SHA256, ARCHIVE)
        store(folder / ARCHIVE, archive)
    parsed = parse_archive(archive)
    store_splits(folder, parsed.splits, _VERSION, parsed.counts)
    for domain, count in parsed.counts.items():
        _LOG.info("reviews: %s: %s", domain, dict(count))
    return parsed.splits


def _stored_archive(folder: Path) -> bytes | None:
    """The archive in the cache; None where there is none or it is damaged."""
    try:
        return checked((folder / ARCHIVE).read_bytes(), SHA256, str(folder / ARCHIVE))
    except (OSError, InputError):
        return None


def _archive_in(data: Path) -> bytes:
    path = data / ARCHIVE
    if not path.is_file():
        raise InputError(f"{data} does not hold {ARCHIVE}; give the folder that holds it")
    return checked(path.read_bytes(), SHA256, str(path))


def _folder() -> Path:
    return cache_home() / "reviews"
