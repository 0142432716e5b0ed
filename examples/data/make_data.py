"""python examples/data/make_data.py VADER WORDNET [--out examples/data]

Rebuilds the Parquet files of the quickstart from the two unpacked sources:

VADER    the unpacked source distribution of vaderSentiment 2.5; its archive
         additional_resources/hutto_ICWSM_2014.tar.gz need not be unpacked
WORDNET  the folder of WordNet 3.0's database that holds data.noun
         (usr/share/wordnet in the Debian package wordnet-base)

Needs the package `datasets`. Rows are drawn and ordered by hashes of their
texts, so the same sources always give the same rows in the same order.
README.md beside this file says what the tasks are.
"""

import argparse
import hashlib
import html
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

# At most, where the source holds so many.
TRAIN_ROWS = 8000
TEST_ROWS = 1000
# Train rows more alike than this to a test row are left out (Jaccard index
# of the two sets of words).
TOO_ALIKE = 0.75

POLARITY = ["negative", "positive"]

# WordNet's lexicographer files, by number: see lexnames(5WN).
NOUNS = {
    4: "act",
    5: "animal",
    6: "artifact",
    8: "body",
    9: "cognition",
    10: "communication",
    13: "food",
    15: "location",
    18: "person",
    20: "plant",
    26: "state",
    27: "substance",
}


def normalise(text):
    """The text as it is compared: letters and digits in lower case."""
    text = unicodedata.normalize("NFKD", text).lower()
    return " ".join(re.findall(r"[a-z0-9]+", text))


def digest(text):
    return hashlib.sha256(normalise(text).encode()).hexdigest()


def vader_rows(source, name):
    """(mean rating from -4 to 4, text) of the rows of one of VADER's files."""
    archive = Path(source) / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        lines = member.read().decode("utf-8").splitlines()
    for line in lines:
        _, score, text = line.split("\t", 2)
        yield float(score), " ".join(html.unescape(text).split())


def sentiment(source, name, threshold):
    """(text, label): snippets whose mean rating is far enough from 0."""
    for score, text in vader_rows(source, name):
        if abs(score) >= threshold:
            yield text, "positive" if score > 0 else "negative"


def definition(gloss):
    """A gloss without its examples, which stand in quotes at its end."""
    text = re.split(r";?\s*\"", gloss, maxsplit=1)[0]
    return " ".join(text.split()).strip(" ;:")


def glosses(source, names):
    """(text, label): definitions of the synsets of these lexicographer files."""
    for line in (Path(source) / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence at the head of the file
            continue
        fields, gloss = line.split("|", 1)
        label = names.get(int(fields.split()[1]))
        text = definition(gloss)
        if label is not None and text:
            yield text, label


def split(rows, labels, test_rows=TEST_ROWS, balanced=True):
    """(train, test): lists of (text, label) that share no text."""
    seen = defaultdict(set)
    for text, label in rows:
        seen[normalise(text)].add(label)
    unique = {}
    for text, label in rows:
        key = normalise(text)
        # Fewer than three words say little; two labels contradict.
        if len(key.split()) >= 3 and len(seen[key]) == 1:
            unique.setdefault(key, (text, label))
    rows = sorted(unique.values(), key=lambda row: digest(row[0]))
    # Balanced: as many rows for each label; otherwise the source's shares.
    have = Counter(label for _, label in rows)
    share = {k: 1 / len(labels) if balanced else have[k] / len(rows) for k in labels}
    test, rest, taken = [], [], Counter()
    for text, label in rows:
        if taken[label] < round(test_rows * share[label]):
            taken[label] += 1
            test.append((text, label))
        else:
            rest.append((text, label))
    words = [frozenset(normalise(text).split()) for text, _ in test]
    train, taken = [], Counter()
    for text, label in rest:
        own = frozenset(normalise(text).split())
        if taken[label] >= round(TRAIN_ROWS * share[label]) or any(
            len(own & other) >= TOO_ALIKE * len(own | other) for other in words
        ):
            continue
        taken[label] += 1
        train.append((text, label))
    return train, test


def write(path, rows, labels):
    features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
    rows = sorted(rows, key=lambda row: digest(row[0]))
    columns = {"text": [r[0] for r in rows], "label": [r[1] for r in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(path)
    counts = Counter(columns["label"])
    shown = ", ".join(f"{name} {counts[name]}" for name in labels)
    print(f"{path}: {len(rows)} rows, {path.stat().st_size:,} bytes; {shown}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vader", type=Path)
    parser.add_argument("wordnet", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    nouns = sorted(NOUNS.values())
    movies = list(sentiment(args.vader, "movieReviewSnippets", threshold=1.0))
    tweets = list(sentiment(args.vader, "tweets", threshold=0.5))
    products = list(sentiment(args.vader, "amazonReviewSnippets", threshold=0.5))
    tasks = {
        "movies": (POLARITY, split(movies, POLARITY)),
        # Here the negative ones are few: these tasks keep the source's shares.
        "tweets": (POLARITY, split(tweets, POLARITY, 800, balanced=False)),
        "products": (POLARITY, split(products, POLARITY, 800, balanced=False)),
        "nouns": (nouns, split(list(glosses(args.wordnet, NOUNS)), nouns)),
    }
    for task, (labels, parts) in tasks.items():
        for name, rows in zip(["train", "test"], parts, strict=True):
            write(args.out / task / f"{name}.parquet", rows, labels)


if __name__ == "__main__":
    main()
