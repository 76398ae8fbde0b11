"""A few records in LongBench's official schemas, written for these tests: no text of the benchmarks is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_ARCHIVE = (
    "The tide mill at Orrin Bay was built in 1783 by the joiner Mara Veld. It ground barley for forty years. "
    "A storm took its wheel in 1824, and the town sold the stones to the harbour works.\n\n"
    "Its keeper, Tomas Brae, moved to the lighthouse on Gull Rock and kept a diary until 1851.\n\n"
)
_DIALOGUE = (
    "Dialogue: Ida: Did you feed the hens?\nJon: Not yet.\nIda: Please do it before noon.\n"
    "Summary: Jon will feed the hens before noon.\n\n"
)
_CHINESE = (
    "奥林湾的潮汐磨坊由木匠马拉于1783年建造。它磨了四十年大麦。1824年的一场风暴毁掉了水轮，镇里把石头卖给了港口。"
)
_PAPER = "We train a parser on 12 treebanks. Beam search with width 4 is used. No ensembling was tried.\n\n"
_CODE = "def area(width, height):\n    return width * height\n\ndef perimeter(width, height):\n"
_CLASSES = ["Abbreviation", "Number", "Number of years", "Place"]
_TOPICS = ["体育", "经济", "天气"]

# Task -> (input, context, answers) of each record.
V1: dict[str, list[tuple[str, str, list[str]]]] = {
    "narrativeqa": [
        ("Who built the mill?", _ARCHIVE, ["Mara Veld", "The joiner Mara Veld"]),
        ("Where did Tomas Brae move?", _ARCHIVE, ["To the lighthouse on Gull Rock"]),
    ],
    "qasper": [
        ("How wide is the beam?", _PAPER, ["4", "width 4"]),
        ("Is an ensemble used?", _PAPER, ["No"]),
    ],
    "multifieldqa_en": [("When was the mill built?", _ARCHIVE, ["1783"])],
    "multifieldqa_zh": [("磨坊是谁建造的？", _CHINESE, ["木匠马拉"])],
    "hotpotqa": [
        ("Which trade had the builder of the mill that lost its wheel in 1824?", _ARCHIVE, ["joiner"]),
        ("Where did the keeper of the mill at Orrin Bay write his diary?", _ARCHIVE, ["Gull Rock"]),
    ],
    "2wikimqa": [("Who kept the mill that Mara Veld built?", _ARCHIVE, ["Tomas Brae"])],
    "musique": [("In which year did the wheel of Mara Veld's mill go?", _ARCHIVE, ["1824"])],
    "dureader": [("石头卖给了谁？", _CHINESE, ["石头卖给了港口。"])],
    "gov_report": [("", _ARCHIVE * 2, ["A mill was built in 1783 and lost its wheel in 1824."])],
    "qmsum": [("What was said of the stones?", _ARCHIVE, ["The town sold the stones to the harbour works."])],
    "multi_news": [("", _ARCHIVE, ["The mill at Orrin Bay lost its wheel in a storm."])],
    "vcsum": [("", _CHINESE * 2, ["会议讨论了磨坊的历史。"])],
    "trec": [
        (
            "Question: Where is Gull Rock ?\nType:",
            "Question: How many wheels has a mill ?\nType: Number\n"
            "Question: What does UN stand for ?\nType: Abbreviation\n",
            ["Place"],
        ),
        (
            "Question: How long did the mill grind ?\nType:",
            "Question: Where is Rome ?\nType: Place\n",
            ["Number of years"],
        ),
    ],
    "triviaqa": [
        (
            "Passage:\nThe mill stood at Orrin Bay.\nQuestion:\nWhere did the mill stand?\nAnswer:\n",
            "Passage:\nHens lay eggs.\nQuestion:\nWhat do hens lay?\nAnswer:\neggs\n",
            ["Orrin Bay", "at Orrin Bay"],
        )
    ],
    "samsum": [
        ("Dialogue: Ida: The gate is open.\nJon: I will close it.\nSummary: ", _DIALOGUE, ["Jon will close the gate."])
    ],
    "lsht": [("新闻内容：明天有雨。\n类别：", "新闻内容：球队赢了。\n类别：体育\n", ["天气"])],
    "passage_count": [
        ("", "Paragraph 1: Hens lay eggs.\n\nParagraph 2: Mills grind.\n\nParagraph 3: Hens lay eggs.", ["2"])
    ],
    "passage_retrieval_en": [
        ("A storm broke the wheel.", "Paragraph 1: Hens.\n\nParagraph 2: A storm in 1824 took it.", ["Paragraph 2"])
    ],
    "passage_retrieval_zh": [("风暴毁掉了水轮。", "段落1：母鸡下蛋。\n\n段落2：1824年的风暴。", ["段落2"])],
    "lcc": [
        ("", _CODE, ["    return 2 * (width + height)"]),
        ("", "import math\n\n\ndef circle(radius):\n", ["    return math.pi * radius**2"]),
    ],
    "repobench-p": [
        (
            "# shapes.py\nfrom area import area\n\ndef square(side):\n",
            "# area.py\n" + _CODE,
            ["    return area(side, side)"],
        )
    ],
}


def v1_record(task: str, place: int) -> dict[str, Any]:
    """One record as the official files have it."""
    question, context, answers = V1[task][place]
    chinese = task.endswith("_zh") or task in ("dureader", "vcsum", "lsht")
    return {
        "input": question,
        "context": context,
        "answers": answers,
        "length": len(context) if chinese else len(context.split()),
        "dataset": task,
        "language": "zh" if chinese else "en",
        "all_classes": {"trec": _CLASSES, "lsht": _TOPICS}.get(task),
        "_id": f"{task}-{place}",
    }


def write_v1(folder: Path, tasks: list[str] | None = None) -> Path:
    """<task>.jsonl for each task; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks or V1:
        rows = [json.dumps(v1_record(task, place), ensure_ascii=False) for place in range(len(V1[task]))]
        (folder / f"{task}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return folder


def v2_record(**changes: Any) -> dict[str, Any]:
    """One record of LongBench v2's file."""
    record = {
        "_id": "66f0",
        "domain": "Single-Document QA",
        "sub_domain": "Literary",
        "difficulty": "easy",
        "length": "short",
        "question": "Who built the mill?",
        "choice_A": "Tomas Brae",
        "choice_B": "Mara Veld",
        "choice_C": "The town",
        "choice_D": "Nobody knows",
        "answer": "B",
        "context": _ARCHIVE,
    }
    return {**record, **changes}


def v2_records() -> list[dict[str, Any]]:
    """Four records over two documents."""
    return [
        v2_record(),
        v2_record(_id="66f1", question="When did it lose its wheel?", choice_A="1783", choice_B="1824", choice_C="1851",
                  choice_D="2000", answer="B", difficulty="hard", length="medium"),
        v2_record(_id="66f2", domain="Code Repository Understanding", sub_domain="Code repo QA", context=_CODE,
                  question="What does area return?", choice_A="a sum", choice_B="a list", choice_C="a product",
                  choice_D="nothing", answer="C", difficulty="hard"),
        v2_record(_id="66f3", question="Where is the diary's end?", choice_A="1851", choice_B="1700", choice_C="1600",
                  choice_D="1500", answer="A", sub_domain="Detective", length="long"),
    ]  # fmt: skip
