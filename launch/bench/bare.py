"""The libraries of every stage by themselves: no checks, no limits, no reasons."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import trafilatura
from datatrove.data import Document
from datatrove.pipeline import filters
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from fastwarc.warc import ArchiveIterator, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text

from rlpt_data.quality import QualityConfig, _words


@dataclass(frozen=True)
class Bare:
    """One function for each stage."""

    extract: Callable[[str], str]
    filters: Sequence[Any]
    minhash: MinhashDedupSignature
    tokenizer: tokenizers.Tokenizer

    def read(self, path: Path) -> int:
        """Bodies of all responses, by fastwarc; gives their number."""
        with path.open("rb") as file:
            records = ArchiveIterator(file, record_types=WarcRecordType.response)
            return sum(len(record.reader.read()) > 0 for record in records)

    def keeps(self, text: str) -> bool:
        document = Document(text=text, id="")
        try:
            return all(rule.filter(document) is True for rule in self.filters)
        except ZeroDivisionError:
            return False

    def signature(self, text: str) -> Any:
        shingles = self.minhash.get_shingles(text)
        return self.minhash.get_signature(shingles) if len(shingles) else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]


def bare_for(profile: str, tokenizer: Path) -> Bare:
    """FineWeb's published order of rules in both profiles; words are counted as the profile does."""
    words = _words(profile, "eng")
    words.word_tokenize("Warm up.")
    stop_words = list(QualityConfig.model_fields["stop_words"].default)
    rules = [
        filters.GopherRepetitionFilter(language=words),
        filters.GopherQualityFilter(language=words, stop_words=stop_words),
        filters.C4QualityFilter(filter_no_terminal_punct=False, language=words),
        filters.FineWebQualityFilter(language=words),
    ]
    hashes = HashConfig(hash_fc="sha1", precision=64)
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=hashes)
    minhash = MinhashDedupSignature(output_folder="unused", config=config, language=words)
    minhash.get_signature(minhash.get_shingles("a few words to warm up with"))
    extract = _trafilatura if profile == "fineweb" else _resiliparse
    return Bare(extract, rules, minhash, tokenizers.Tokenizer.from_file(str(tokenizer)))


def _trafilatura(html: str) -> str:
    return trafilatura.extract(html, favor_precision=True, include_comments=False) or ""


def _resiliparse(html: str) -> str:
    return extract_plain_text(html, main_content=True, alt_texts=False, comments=False)
