# SPDX-License-Identifier: Apache-2.0
"""The demo model's tokenizer: 4,096 ids, BPE merges learnt on the synthetic conversations and on docstrings of the transformers package.
  python3 make_tok.py DEEPSEEK_V3_TOKENIZER_DIR OUT_DIR
The pre-tokenizer, the decoder and the control tokens come from DeepSeek-V3's tokenizer.json."""
import json, random, sys, glob, os, re
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
os.environ["TOKENIZERS_PARALLELISM"]="false"
from data import *
from tokenizers import Tokenizer, Regex, models, pre_tokenizers, decoders, trainers
source, out = sys.argv[1:3]
src = json.load(open(source + "/tokenizer.json"))
pre = src["pre_tokenizer"]["pretokenizers"]
os.makedirs(out, exist_ok=True)
r = random.Random(1)
texts = []
for _ in range(30000):
    t, m, tl = conversation(r, tokens=120)
    texts += [re.sub(r"<｜[^｜]*｜>", "\n", s) for s, _ in segments(m, tl)]
for ts, a in TERMS:
    texts += [a] * 30 + [q.format(t=t) for t in ts for q in TERM_Q]
for qs, a in QA: texts += [a] * 30 + qs * 10
texts += [" " + w for w in ADJ + NOUN + VERB + CITIES + NAMES + LAST] * 40
texts += [w for w in NAMES + CITIES] * 20
# Apache-2.0 prose for general English coverage: docstrings of the transformers package (merge statistics only)
import transformers
root = os.path.dirname(transformers.__file__)
doc = []
for f in sorted(glob.glob(root + "/**/*.py", recursive=True))[::6]:
    for d in re.findall(r'"""(.*?)"""', open(f, errors="ignore").read(), re.S)[:12]:
        d = re.sub(r"`[^`]*`|https?\S+|[_#*]|\{\{.*?\}\}", " ", d); doc.append(re.sub(r"\s+", " ", d)[:1500])
print(len(texts), sum(map(len, texts)), len(doc), sum(map(len, doc)))
texts += doc
tk = Tokenizer(models.BPE())
seq = [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")]      # digits stay single tokens: no merges are learnt over them
seq += [pre_tokenizers.Split(Regex(p["pattern"]["Regex"]), "isolated") for p in pre[1:3]]
seq += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
tk.pre_tokenizer = pre_tokenizers.Sequence(seq)
V = 4096
tr = trainers.BpeTrainer(vocab_size=V - len(ADDED) , special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
tk.train_from_iterator(texts, tr)
j = json.loads(tk.to_str())
n = len(j["model"]["vocab"]); print("bpe vocab", n)
assert n == V - len(ADDED), n
src["model"]["vocab"] = {k: v for k, v in sorted(j["model"]["vocab"].items(), key=lambda x: x[1])}
src["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in j["model"]["merges"]]
old = {a["content"]: a for a in src["added_tokens"]}
add = []
for i, c in enumerate([BOS, EOS, PAD]): add.append({**old[c], "id": i})
for i, c in enumerate(ADDED):
    o = old.get(c, {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False})
    add.append({**o, "content": c, "id": n + i})
src["added_tokens"] = [{k: a[k] for k in ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")} for a in add]
json.dump(src, open(out + "/tokenizer.json", "w"), ensure_ascii=False, indent=1)
cfg = json.load(open(source + "/tokenizer_config.json"))
cfg["chat_template"] = CHAT_TEMPLATE; cfg["model_max_length"] = 8192
cfg["tokenizer_class"] = "PreTrainedTokenizerFast"
for k in ("bos_token", "eos_token", "pad_token"): cfg[k] = cfg[k]["content"]
cfg.pop("sp_model_kwargs"); cfg.pop("legacy"); cfg.pop("unk_token")
json.dump(cfg, open(out + "/tokenizer_config.json", "w"), ensure_ascii=False, indent=1)
t = Tokenizer.from_file(out + "/tokenizer.json")
for s in ["What is MLA? 4821 + 17 = 4838", "The code of the red fox is 4821.\n", '{"name":"Maria","age":34,"city":"Lisbon"}', "l-a-m-p", "Größe 你好 🙂 naïve", BOS + USER + "Hello" + ASSISTANT + "<think>\nHi</think>\n\n"]:
    e = t.encode(s, add_special_tokens=False); print(len(e.ids), e.tokens); assert t.decode(e.ids, skip_special_tokens=False) == s, (t.decode(e.ids, skip_special_tokens=False), s)
