"""Texts of scripts without spaces are cut between letters, and texts with spaces as ever."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlpt_data import places, rows
from rlpt_data.cuts import CutsConfig, candidates
from rlpt_data.documents import SourceDocument
from rlpt_data.rows import RowMaker
from rlpt_data.shards import CUT_KINDS, Document
from rlpt_data.tokenizer import PlainTokenizer, train_byte_pairs

TEXTS = {
    "japanese": "朝の市場には新鮮な野菜がたくさん並んでいました。おばあさんは「今日は大根が安いよ。」と笑い"
    "ながら言った。私は三本買って、友達の家まで歩いて行きました。あの頃は毎日が冒険だったのに、"
    "いつから忘れてしまったのだろう？雨が降り始めたので、古い神社の軒下で少し休むことにした。",
    "chinese": "春天来了，河边的柳树又发出了嫩绿的新芽。孩子们在草地上奔跑，放着五颜六色的风筝。他说：“这样"
    "的日子，一年也没有几天。”我们点点头，谁也没有再说话。太阳慢慢落下去，天边出现了一片红色的云彩！",
    "thai": "เมื่อวานนี้ฉันไปตลาดกับแม่เพื่อซื้อผลไม้และดอกไม้ ตลาดเต็มไปด้วยผู้คนที่กำลังต่อรองราคากันอย่างสนุกสนาน "
    "แม่เลือกมะม่วงสุกสามลูกและกล้วยหนึ่งหวี หลังจากนั้นเราเดินกลับบ้านด้วยกันตามถนนเล็กๆริมแม่น้ำ",
}
LOOSE = CutsConfig(min_context=1, min_continuation=1, random_every=2)


@pytest.fixture(scope="module")
def tokenizers() -> list[PlainTokenizer]:
    """Bytes, and pairs learnt on the texts themselves: tokens of whole words and across them."""
    trained = train_byte_pairs([text * 4 for text in TEXTS.values()], 700)
    return [PlainTokenizer(train_byte_pairs((), 256), "bytes"), PlainTokenizer(trained, "pairs")]


def row(tokenizer: PlainTokenizer, text: str, config: CutsConfig = LOOSE) -> Document:
    found = RowMaker(tokenizer, config, 0).rows([("id", SourceDocument(text))])[0]
    assert isinstance(found, Document)
    return found


def contexts(found: Document, kind: str | None = None) -> list[str]:
    """The text before each cut."""
    data = found.text.encode()
    pairs = zip(found.cuts, found.cut_kinds, strict=True)
    return [
        data[: found.offsets[cut]].decode()
        for cut, number in pairs
        if kind in (None, CUT_KINDS[number])
    ]


@pytest.mark.parametrize("language", sorted(TEXTS))
def test_a_context_alone_is_encoded_to_the_ids_before_its_cut(
    language: str, tokenizers: list[PlainTokenizer]
) -> None:
    for tokenizer in tokenizers:
        found = row(tokenizer, TEXTS[language] * 2)
        # Random ones are asked for at half of all tokens; most of a byte tokenizer's lie in letters.
        assert len(found.cuts) > 40
        for cut, alone in zip(found.cuts, tokenizer.encode(contexts(found)), strict=True):
            assert alone.tolist() == found.ids[:cut].tolist()


@pytest.mark.parametrize("language", ["chinese", "japanese"])
def test_sentences_end_after_their_mark_and_what_closes_with_it(
    language: str, tokenizers: list[PlainTokenizer]
) -> None:
    text = TEXTS[language]
    found = contexts(row(tokenizers[0], text, LOOSE.model_copy(update={"kinds": ("sentence",)})))
    ends = [match.end() for match in re.finditer("[。！？]+[」”]?", text)]
    assert [len(context) for context in found] == ends[:-1]


def test_no_cut_lies_before_a_sign_a_small_letter_or_within_a_link(
    tokenizers: list[PlainTokenizer],
) -> None:
    regex = pytest.importorskip("regex")
    link = "https://ja.example.org/野菜市場"
    for text in (TEXTS["thai"], f"{TEXTS['japanese']}きょう、チョコを買った。{link}を見る。"):
        every = LOOSE.model_copy(update={"random_every": 1})
        graphemes = {match.start() for match in regex.finditer(r"\X", text)}
        links = [range(m.start() + 1, m.end()) for m in re.finditer(re.escape(link), text)]
        for context in contexts(row(tokenizers[0], text, every)):
            assert len(context) in graphemes
            assert not re.match(
                "[\u0e30-\u0e3a\u0e45-\u0e4eょっーッョ、。」]", text[len(context) :]
            )
            assert not any(len(context) in inside for inside in links)


def test_places_that_the_tokenizer_does_not_keep_are_left_out() -> None:
    data = TEXTS["thai"].encode()
    offsets = np.arange(len(data) + 1, dtype=np.uint32)
    asked: list[int] = []

    def never(cuts: list[int]) -> list[bool]:
        asked.extend(cuts)
        return [False] * len(cuts)

    kept, _ = candidates(data, offsets, "id", LOOSE, 0, stable=never)
    assert len(asked) > 40
    assert {data[cut : cut + 1] for cut in kept} == {b" "}


def test_a_context_that_is_read_otherwise_without_what_follows_is_no_context() -> None:
    """A tokenizer that looks ahead: it parts the word for spring where a third letter follows."""
    table = json.loads(train_byte_pairs(["春天" * 40], 260))
    look = {
        "type": "Split",
        "pattern": {"Regex": "天(?=来)"},
        "behavior": "Isolated",
        "invert": False,
    }
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [look, letters]}
    tokenizer = PlainTokenizer(json.dumps(table).encode(), "looks ahead")
    found = contexts(
        row(tokenizer, "春天去春天来春天" * 8, LOOSE.model_copy(update={"random_every": 1}))
    )
    assert len(found) > 20
    assert {context[-1] for context in found} == {"天", "去", "来", "春"}
    assert not any(context.endswith("天") and (len(context) % 8) == 5 for context in found)


def test_a_few_foreign_words_do_not_change_the_cuts_of_a_text_with_spaces() -> None:
    text = "The market (朝の市場, or ตลาด) is open. " * 5
    data = text.encode()
    offsets = np.arange(len(data) + 1, dtype=np.uint32)

    def unasked(cuts: list[int]) -> list[bool]:
        raise AssertionError(cuts)

    before = candidates(data, offsets, "id", LOOSE, 0)
    after = candidates(data, offsets, "id", LOOSE, 0, stable=unasked)
    assert before[0].tolist() == after[0].tolist()
    assert before[1].tolist() == after[1].tolist()


def test_a_line_without_end_is_looked_at_through_a_window() -> None:
    text = ("春" * 2000 + " " + "天" * 100).encode()
    offsets = np.append(np.arange(0, len(text), 1), len(text)).astype(np.uint32)
    far, near = rows._window_starts(text, offsets, [3000, 6100])
    # 256 bytes back is within a letter; the last word end is nearer than that.
    assert (far, near) == (3000 - 256 + 1 + (-(3000 - 256 + 1)) % 3, 6000)


PLAIN = {
    "word": re.compile(rb"(?<=\S)(?=\s)"),
    "paragraph": re.compile(rb"(?<=\S)(?=[^\S\n]*\n[^\S\n]*\n)"),
    "sentence": re.compile(
        rb"(?<![^A-Za-z][A-Z])(?:[.!?]|\xe2\x80\xa6)(?:[\"')\]*_]|\xe2\x80[\x99\x9d])*"
        rb"(?=\s+[\"'(\[*_#>-]*[A-Z0-9\x80-\xff])"
    ),
}


@given(st.text(alphabet=' \n\r\tabAB.!?é\u00a0\u2026\u2019\u201d0"*_', max_size=80))
@example("\n\na b")
@settings(max_examples=300, deadline=None)
def test_places_are_those_of_the_patterns_that_define_them(text: str) -> None:
    data = text.encode()
    words = places.word_ends(data)
    found = {
        "word": words,
        "paragraph": places.paragraph_ends(data, words),
        "sentence": places.sentence_ends(data),
    }
    for kind, pattern in PLAIN.items():
        assert found[kind].tolist() == [match.end() for match in pattern.finditer(data)], kind
