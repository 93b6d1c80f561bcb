#!/usr/bin/env python3
"""Makes tests/golden/text/*.json: what Transformers makes of texts, token streams and conversations.

    scripts/make_text_golden.py --deepseek DIR     tokenizer.json, streaming.json, chat.json
    scripts/make_text_golden.py --demo             demo.json

DIR is a folder with DeepSeek-V3's tokenizer.json and tokenizer_config.json. Needs transformers 5.23 and
jinja2 3.1 (scripts/requirements.txt). The output depends on nothing else: the generator is seeded.
"""

import argparse
import codecs
import hashlib
import json
import pathlib
import random

import jinja2
import tokenizers
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from text_golden_cases import CODE, EMO, FIXED, JA, ZH, chats, en, kinds, rs

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/text"
SEED = 20261123
TPL = {k: (GOLDEN / f"templates/deepseek_{k}.jinja").read_text() for k in ("v3", "r1", "r1_distill", "v31")}


def r1_derived(tj):
    """R1's tokenizer: V3's with thinking tags in place of two placeholders."""
    rj = json.loads(json.dumps(tj))
    for a in rj["added_tokens"]:
        if a["id"] in (128798, 128799):
            a.update(
                content="<think>" if a["id"] == 128798 else "</think>",
                normalized=True,
                special=False,
            )
    return Tokenizer.from_str(json.dumps(rj))


def b2u():
    bs = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    cs = bs[:]
    n = 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    return {chr(c): b for b, c in zip(bs, cs)}


class Reference:
    """A tokenizer as Transformers and the tokenizers library read it."""

    def __init__(self, folder):
        self.tk = AutoTokenizer.from_pretrained(folder)
        self.raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tj = json.load(open(folder / "tokenizer.json"))
        self.sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
        self.u2b = b2u()
        self.added = {a["id"]: a for a in self.tj["added_tokens"]}
        contents = [a["content"] for a in self.tj["added_tokens"]]
        self.kinds = kinds(
            [c for c in contents if "place" not in c],
            [c for c in contents if "place" in c] or ["no placeholder"],
        )
        self.token_bytes = {}
        for t, i in self.tj["model"]["vocab"].items():
            self.token_bytes[i] = (
                bytes(self.u2b[c] for c in t) if all(c in self.u2b for c in t) else t.encode()
            )
        for i, a in self.added.items():
            self.token_bytes[i] = a["content"].encode()
        self.by_byte = {b[0]: i for i, b in self.token_bytes.items() if len(b) == 1}

    def meta(self):
        return {
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "jinja2": jinja2.__version__,
            "chat_reference": "transformers render_jinja_template, null-valued keys kept; hf5_differs = what transformers 5.23 apply_chat_template gives instead (it drops null keys and refuses empty chats)",
            "tokenizer_json_sha256": self.sha256,
        }

    def encode(self, text):
        return self.tk(text, add_special_tokens=False)["input_ids"]

    def pieces(self, ids, skip):
        d = codecs.getincrementaldecoder("utf-8")("replace")
        out = []
        for i in ids:
            out.append(
                ""
                if (skip and i in self.added and self.added[i]["special"]) or i not in self.token_bytes
                else d.decode(self.token_bytes[i])
            )
        return out, d.decode(b"", True)

    def tokcase(self, kind, s):
        ids = self.tk(s, add_special_tokens=False)["input_ids"]
        assert ids == self.raw.encode(s, add_special_tokens=False).ids
        d0 = self.tk.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        d1 = self.tk.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert d0 == s, (kind, s, d0)
        return {"kind": kind, "text": s, "ids": ids, "decode": d0, "decode_skip_special": d1}

    def tokset(self, seed, per):
        r = random.Random(seed)
        cs = [self.tokcase("fixed", s) for s in FIXED]
        for k, f in self.kinds.items():
            for _ in range(per):
                cs.append(self.tokcase(k, f(r)))
        L = [
            " ".join(en(r, 20) for _ in range(300)),
            "".join(rs(r, ZH, 50) + en(r, 5) + rs(r, JA, 20) + "\n" for _ in range(300)),
            "".join(r.choice(CODE) for _ in range(1500)),
            rs(r, "abcdefghij", 20000),
            " " * 5000 + "x",
            rs(r, "0123456789", 5000),
        ]
        for s in L:
            cs.append(self.tokcase("very_long", s))
        return cs

    def streamset(self, seed):
        r = random.Random(seed)
        cs = []

        def add(kind, ids, skip):
            p, f = self.pieces(ids, skip)
            full = self.raw.decode(ids, skip_special_tokens=skip)
            assert (
                "".join(p) + f
                == full
                == self.tk.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            ), (kind, ids, p, f, full)
            if kind != "random_ids" and "\ufffd" not in full:
                assert all("\ufffd" not in x for x in p)
            cs.append(
                {
                    "kind": kind,
                    "skip_special_tokens": skip,
                    "ids": ids,
                    "pieces": p,
                    "final": f,
                    "text": full,
                }
            )

        def enc(s):
            return self.raw.encode(s, add_special_tokens=False).ids

        # byte-level: every byte as own token (worst case splits)
        byteid = self.by_byte
        for k in (
            "mixed_script",
            "emoji",
            "other_script",
            "chinese",
            "japanese",
            "special_in_text",
            "think",
            "random_unicode",
            "replacement_char",
            "combining",
            "code",
            "english",
        ):
            for _ in range(4):
                s = self.kinds[k](r)
                add("enc_" + k, enc(s), r.random() < 0.5)
            for _ in range(2):
                s = self.kinds[k](r)
                if all(b in byteid for b in s.encode()):
                    add("bytes_" + k, [byteid[b] for b in s.encode()], True)
        for _ in range(6):
            s = r.choice(["😀", "中", "é", "👩‍👩‍👧‍👦"]) * r.randint(1, 3)
            ids = [byteid[b] for b in s.encode()]
            i = r.randint(1, len(ids) - 1)
            add("special_inside_char", ids[:i] + [r.choice([0, 1, 2])] + ids[i:], True)
            add("special_inside_char", ids[:i] + [r.choice([1, 128803, 128804])] + ids[i:], False)
            add("truncated_tail", ids[:i], True)
            add("invalid_then_ascii", ids[:i] + enc("abc"), True)
            add("lone_continuation", [byteid[x] for x in (0x80, 0xBF)] + ids, True)
        for _ in range(12):
            add(
                "random_ids",
                [
                    r.choice(
                        [
                            r.randint(0, 127999),
                            r.randint(0, 260),
                            r.randint(128798, 128814),
                            r.randint(128815, 129279),
                        ]
                    )
                    for _ in range(r.randint(1, 60))
                ],
                r.random() < 0.5,
            )
        add("empty", [], True)
        add("unused_rows_only", [128815, 129279], False)
        add("skip_keeps_role_tokens", [128803] + enc("hi") + [128804, 1], True)
        return cs


def attempt(f):
    try:
        return {"text": f()}
    except Exception as ex:
        return {"error": type(ex).__name__, "message": str(ex)[:160]}


def render(ref, case, template):
    """What Transformers' renderer makes of a conversation, null values kept (as 4.x, vLLM and SGLang do)."""
    kw = dict(
        add_generation_prompt=case["add_generation_prompt"],
        continue_final_message=case.get("continue_final_message", False),
        **case.get("kwargs", {}),
    )
    tokens = {k: v for k, v in ref.tk.special_tokens_map.items() if isinstance(v, str)}
    return attempt(
        lambda: render_jinja_template(
            [case["messages"]], tools=case.get("tools"), chat_template=template, **kw, **tokens
        )[0][0]
    )


def apply_chat_template(ref, case, template):
    """The same through the public function, which drops null keys."""
    kw = dict(
        add_generation_prompt=case["add_generation_prompt"],
        continue_final_message=case.get("continue_final_message", False),
        **case.get("kwargs", {}),
    )
    call = lambda **k: ref.tk.apply_chat_template(
        case["messages"], tools=case.get("tools"), chat_template=template, **k, **kw
    )
    result = attempt(lambda: call(tokenize=False))
    if "text" in result:
        assert list(call(tokenize=True, return_dict=False)) == ref.encode(result["text"])
    return result


def deepseek_chats(ref):
    r1 = r1_derived(ref.tj)
    out = chats(SEED + 2)
    for case in out:
        case["results"] = {}
        differs = {}
        for name, template in TPL.items():
            result = render(ref, case, template)
            if "text" in result:
                text = result["text"]
                result["ids"] = ref.encode(text)
                ids = r1.encode(text, add_special_tokens=False).ids
                if name != "v3" and ids != result["ids"]:
                    result["ids_r1_derived"] = ids
            case["results"][name] = result
            applied = apply_chat_template(ref, case, template)
            if result.get("text") != applied.get("text"):
                differs[name] = applied
        if differs:
            case["hf5_differs"] = differs
    return out


def demo(ref):
    """The demo model's tokenizer and template: fewer and shorter cases, the same kinds."""
    texts = [c for c in ref.tokset(SEED + 3, 2) if c["kind"] != "very_long"]
    streams = ref.streamset(SEED + 4)[::3]
    own = ref.tk.chat_template
    conversations = []
    tool = lambda name: {
        "type": "function",
        "function": {
            "name": name,
            "description": '<b> & "é"',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "maximum": 7},
                },
            },
        },
    }
    for i, case in enumerate(chats(SEED + 5)):
        if case["kind"] == "long_history":
            case["messages"] = case["messages"][:9]
        if i % 5 == 1:
            case["tools"] = [tool("get_weather"), tool("获取")]
        if i % 5 == 2:
            case.setdefault("kwargs", {})["thinking"] = True
        if i % 5 == 3:
            case.setdefault("kwargs", {})["thinking"] = False
        result = render(ref, case, own)
        if "text" in result:
            result["ids"] = ref.encode(result["text"])
        conversations.append({**case, "results": {"demo": result}})
    return {"meta": ref.meta(), "tokenizer": texts, "streaming": streams, "chat": conversations}


def write(name, value):
    path = GOLDEN / name
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepseek", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    if not args.deepseek and not args.demo:
        parser.error("nothing to make: give --deepseek DIR or --demo")
    if args.deepseek:
        ref = Reference(args.deepseek)
        for name, cases in (
            ("tokenizer", ref.tokset(SEED, 6)),
            ("streaming", ref.streamset(SEED + 1)),
            ("chat", deepseek_chats(ref)),
        ):
            write(name + ".json", {"meta": ref.meta(), "cases": cases})
    if args.demo:
        write("demo.json", demo(Reference(ROOT / "deploy/demo-model")))


if __name__ == "__main__":
    main()
