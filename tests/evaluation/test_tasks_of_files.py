"""Every task of LongBench, ZeroSCROLLS and SCBench, from rows that are written here in the published format."""

import importlib.util
import json

import pytest

from kvjax.evaluation.metrics import METRICS, by_words
from kvjax.evaluation.tasks import TASKS, make_task
from kvjax.evaluation.tasks.published import prompts
from tests.evaluation.letters import MODEL, prompt, read

NEEDS_JIEBA = pytest.mark.skipif(importlib.util.find_spec("jieba") is None, reason="jieba is not installed")


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def score(task, sample, text):
    return METRICS[task.metric](text, sample.references, sample.info)


def gold(task, sample):
    """What the first answer scores, as a model would write it."""
    return score(task, sample, read(sample.answers[0]))


# LongBench: how the published prompt begins and ends (# is the context, @ the input), tokens, answers of two rows.

PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n#",
    "\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words."
    "\n\nQuestion: @\nAnswer:",
    32,
    (["a fox", "the red fox"], ["Rome"]),
)
SUMMARIES = (["Costs rose by far"], ["The board met twice."])
CHINESE = (["中国首都是北京"], ["小明在上海", "上海"])
LONGBENCH = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: #",
        "\n\nQuestion: @\n\nAnswer:",
        128,
        (["a fox", "the red fox"], ["Rome"]),
    ),
    "qasper": (
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: #\n\n Answer the question based on the above article",
        "Do not provide any explanation.\n\nQuestion: @\n\nAnswer:",
        128,
        (["Europarl"], ["unanswerable"]),
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n#\n\nNow, answer the following question based on the above",
        "text, only give me the answer and do not output any other words.\n\nQuestion: @\nAnswer:",
        64,
        (["a fox"], ["Rome"]),
    ),
    "multifieldqa_zh": ("阅读以下文字并用中文简短回答：\n\n#\n\n现在请基于", "问题：@\n回答：", 64, CHINESE),
    "hotpotqa": PASSAGES,
    "2wikimqa": PASSAGES,
    "musique": PASSAGES,
    "dureader": (
        "请基于给定的文章回答下述问题。\n\n文章：#\n\n请基于上述文章回答下面的问题。",
        "\n\n问题：@\n回答：",
        128,
        CHINESE,
    ),
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n#",
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        SUMMARIES,
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n#",
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: @\nAnswer:",
        512,
        SUMMARIES,
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n#",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        SUMMARIES,
    ),
    "vcsum": (
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n#",
        "\n\n会议总结：",
        512,
        CHINESE,
    ),
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions.\n\n#",
        "\n@",
        64,
        (["City"], ["Group or organization of person"]),
    ),
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n#",
        "\n\n@",
        32,
        (["a fox", "fox"], ["Rome"]),
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n#",
        "\n\n@",
        128,
        SUMMARIES,
    ),
    "lsht": ("请判断给定新闻的类别，下面是一些例子。\n\n#", "\n@", 64, (["体育"], ["农业、农村"])),
    "passage_count": (
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read",
        "such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        (["7"], ["12"]),
    ),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n#\n\nThe following is an abstract.\n\n@\n\nPlease enter",
        'The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        (["Paragraph 3"], ["Paragraph 12"]),
    ),
    "passage_retrieval_zh": (
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n#\n\n下面是一个摘要\n\n@\n\n",
        '答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        (["段落3"], ["段落12"]),
    ),
    "lcc": (
        "Please complete the code given below. \n#",
        "Next line of code:\n",
        64,
        (["    return a + b"], ["x = f(y)"]),
    ),
    "repobench-p": (
        "Please complete the code given below. \n#@",
        "@Next line of code:\n",
        64,
        (["    return a + b"], ["x = f(y)"]),
    ),
}
CLASSES = {
    "trec": ["City", "Group or organization of person", "Animal"],
    "lsht": ["体育", "农业、农村", "科学技术"],
}
FIRST_LINE_ALONE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
CUT_BY_JIEBA = ("multifieldqa_zh", "dureader", "vcsum")


def longbench_rows(name, suffix=""):
    return [
        {
            "input": f"What is {i}?",
            "context": f"Text {{{i}}} of {name}{suffix}.",
            "answers": answers,
            "length": length,
            "dataset": name,
            "language": "en",
            "all_classes": CLASSES.get(name),
            "_id": str(i),
        }
        for i, (answers, length) in enumerate(zip(LONGBENCH[name][3], (3999, 4000), strict=True))
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEEDS_JIEBA if name in CUT_BY_JIEBA else ()) for name in LONGBENCH]
)
def test_longbench(name, tmp_path):
    begin, end, tokens, _ = LONGBENCH[name]
    rows = longbench_rows(name)
    task = make_task(f"longbench_{name}", path=write(tmp_path, name, rows))
    assert task.length is None
    for row, sample in zip(rows, task.samples(MODEL), strict=True):
        wanted = [text.replace("#", row["context"]).replace("@", row["input"]) for text in (begin, end)]
        assert prompt(sample).startswith(wanted[0]) and prompt(sample).endswith(wanted[1])
        assert row["context"] in prompt(sample) and sample.max_new_tokens == tokens
        assert gold(task, sample) == pytest.approx(1.0, abs=1e-6) and score(task, sample, "?") == 0.0
        more = score(task, sample, f"\n{row['answers'][0]}\nzzz 77 City 体育 农业、农村")
        assert (more == pytest.approx(1.0, abs=1e-6)) == (name in FIRST_LINE_ALONE)


def test_longbench_is_whole():
    names = [name for name, entry in TASKS.items() if entry.group == "longbench"]
    assert names == [f"longbench_{name}" for name in prompts("longbench")] and len(names) == 21
    assert {name.removeprefix("longbench_") for name in names} == set(LONGBENCH)


def test_longbench_e(tmp_path):
    names = [name.removeprefix("longbench_e_") for name, entry in TASKS.items() if entry.group == "longbench_e"]
    assert len(names) == 13 and set(names) <= set(LONGBENCH)
    for name in names:
        rows = longbench_rows(name, "_e")
        write(tmp_path, name, longbench_rows(name))
        task = make_task(f"longbench_e_{name}", path=write(tmp_path, f"{name}_e", rows))
        assert task.metric == TASKS[f"longbench_{name}"].metric
        for row, sample in zip(rows, task.samples(MODEL), strict=True):
            assert row["context"] in prompt(sample) and sample.max_new_tokens == LONGBENCH[name][2]
            assert by_words([sample.info | {"score": 1.0}]) == {"4-8k" if row["length"] == 4000 else "0-4k": 1.0}


# ZeroSCROLLS: rows hold the whole prompt. What is asked at the end, and the outputs of two rows.

ZEROSCROLLS = {
    "gov_report": ("Summary:", 1024, (["Costs rose. The board met."], ["No vote was held."])),
    "summ_screen_fd": ("Summary:", 512, (["Bob meets Ann."], ["Ann leaves for Rome."])),
    "qmsum": ("Query:\nWhat of costs?\n\nAnswer:", 512, (["Costs rose by half."], ["They fell again."])),
    "squality": ("Question:\nWho?\n\nAnswer:", 512, (["Bob, who is a cat.", "It is Bob."], ["A cat named Bob."])),
    "qasper": ("Question:\nWhich model?\n\nAnswer:", 128, (["BERT", "a BERT model"], ["Unanswerable"])),
    "narrative_qa": ("Question:\nWho?\n\nAnswer:", 64, (["Bob", "the cat"], ["Ann"])),
    "quality": ("Question and Possible Answers:\nWho?\n (A) Ann\n (B) Bob\n\nAnswer:", 10, (["(B) Bob"], ["(A) Ann"])),
    "musique": ("Question:\nWhere?\n\nAnswer:", 32, (["Rome"], ["unanswerable"])),
    "space_digest": ("Percentage of Positive Reviews:", 36, (["50%"], ["33.3%"])),
    "book_sum_sort": ("Summary IDs in Correct Order:", 256, (["2, 1, 3"], ["1, 2"])),
}


def zeroscrolls_rows(name):
    """One row for every output: rows of the same id are the same question."""
    query, _, outputs = ZEROSCROLLS[name]
    rows = []
    for i, texts in enumerate(outputs):
        head = f"You are given a text. Read it.\n\nText {{{i}}} of {name}."
        about = {"id": f"q{i}", "input": f"{head}\n\n{query}", "document_end_index": len(head)}
        about["truncation_seperator"] = "... [The rest of the text is omitted]\n\n"
        rows += [about | {"pid": f"q{i}_{j}", "output": text} for j, text in enumerate(texts)]
    return rows


@pytest.mark.parametrize("name", ZEROSCROLLS)
def test_zeroscrolls(name, tmp_path):
    query, tokens, outputs = ZEROSCROLLS[name]
    rows = zeroscrolls_rows(name)
    task = make_task(f"zeroscrolls_{name}", path=write(tmp_path, name, rows))
    samples = task.samples(MODEL)
    assert [sample.references for sample in samples] == [tuple(texts) for texts in outputs]
    for i, sample in enumerate(samples):
        assert prompt(sample) == next(row["input"] for row in rows if row["id"] == f"q{i}")
        assert read(sample.question_ids) == f"\n\n{query}" and sample.max_new_tokens == tokens
        assert all(score(task, sample, text) == pytest.approx(1.0) for text in sample.references)
        assert score(task, sample, "?") == 0.0 and score(task, sample, read(samples[1 - i].answers[0])) < 1.0


def test_zeroscrolls_is_whole():
    assert [name for name, entry in TASKS.items() if entry.group == "zeroscrolls"] == [
        f"zeroscrolls_{name}" for name in ZEROSCROLLS
    ]


# SCBench: how the published prompt begins, what a turn's question is (# and @ as above), answers of two turns.

SCBENCH = {
    "kv": (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n#\n\n",
        "@",
        ("1x", "2y"),
    ),
    "prefix_suffix": ("#\n\n", "@", ("abcd", "efgh")),
    "vt": ("#\n\n", "@", (["AB", "CD"], ["EF"])),
    "many_shot": ("#\n\n", "@", (["Alpha", "first"], ["Delta", "last"])),
    "mf": ("What is the largest number of the list?\n\n#\n\n", "@", (9, 2.5)),
    "choice_eng": (
        "Read the book and answer the question.\n\n#\n\n",
        "Question: @\nA. dog\nB. cat\nC. fish\nD. bird\n\nThe ",
        ("cat", "bird"),
    ),
    "qa_eng": (
        "Read the book and answer the question. Be very concise in your answer.\n\n#\n\n",
        "Question: @\nAnswer:",
        (["a cat", "animal"], ["Rome"]),
    ),
    "qa_chn": ("阅读以下书籍然后回答问题。\n\n#\n\n", "问题：@\n答案：", (["北京"], ["上海", "浦东"])),
    "summary": ("#\n\n", "@", ("It is a paper.", "It is on cats.")),
    "summary_with_needles": ("#\n\n", "@", ("It is a paper.", "55")),
}
OPTIONS = ["dog", "cat", "fish", "bird"]
OF_TURN = ("scbench_summary", "scbench_passkey")


@pytest.mark.parametrize("kind", SCBENCH)
@pytest.mark.parametrize("mode", ["multi_turn", "multi_request"])
def test_scbench(kind, mode, tmp_path):
    begin, question, answers = SCBENCH[kind]
    asked = ["You should answer with one number. The largest number of the list is: ", "The smallest of all is: "]
    turns = [
        {"input": text, "answer": answer, "options": OPTIONS, "task": of}
        for text, answer, of in zip(asked, answers, OF_TURN, strict=True)
    ]
    rows = [{"id": i, "context": f"Text {{{i}}} of {kind}.", "multi_turns": turns} for i in range(2)]
    task = make_task(f"scbench_{kind}", path=write(tmp_path, f"scbench_{kind}", rows), mode=mode)
    samples = task.samples(MODEL)
    assert [sample.id for sample in samples] == ["0-1", "0-2", "1-1", "1-2"]
    if mode == "multi_turn":
        assert prompt(samples[2]).startswith(begin.replace("#", rows[1]["context"]))
    for i, sample in enumerate(samples):
        assert rows[i // 2]["context"] in read(sample.context_ids)
        assert question.replace("@", asked[i % 2]) in read(sample.question_ids)
        assert (asked[0] in read(sample.question_ids)) == (i % 2 == 0 or mode == "multi_turn")
        assert gold(task, sample) == pytest.approx(1.0) and score(task, sample, "?") == 0.0
        assert score(task, sample, read(samples[i - 1].answers[0])) < 1.0


def test_scbench_is_whole():
    names = {name for name, entry in TASKS.items() if entry.group == "scbench"}
    assert names == {f"scbench_{kind}" for kind in SCBENCH}
