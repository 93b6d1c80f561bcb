//! Keeps the text of a request from spelling control tokens in a rendered prompt.
//!
//! Before rendering, the characters that delimit control tokens are replaced, one for one, by stand-ins
//! from the private-use planes. The template then moves, joins and cuts strings as it likes: whatever it
//! does, a control token in its output has at least its first and last character, and each `｜`, `▁` and
//! `|` in it, from the template itself. Control tokens are found in that output; then the stand-ins are
//! changed back, and the text between is encoded as text. Lengths and white space stay as they were, and
//! text without these characters is not touched.

use std::collections::{BTreeSet, HashSet};

use serde_json::Value;

use crate::Result;

/// Fields of an assistant message that hold the model's own words: there, thinking tags keep their
/// meaning, because templates cut histories and continue messages by them.
const OWN_WORDS: [&str; 4] = ["content", "reasoning_content", "thinking", "reasoning"];
const THINK_TAGS: [&str; 2] = ["<think>", "</think>"];

const PRIVATE_BEGIN: u32 = 0xF0000;
const PRIVATE_END: u32 = 0x10FFFE;

/// How a tokenizer's control tokens can be told apart from text.
pub struct ControlSpellings {
    // Characters that get a stand-in: the first `num_delimiters` wherever they occur, the others only at
    // the beginning of a name.
    chars: Vec<char>,
    num_delimiters: usize,
    // `think` of `<think>`, `/think` of `</think>`: a template may put the rest around a text.
    names: HashSet<String>,
}

impl ControlSpellings {
    pub fn new<'a>(spellings: impl Iterator<Item = &'a str>) -> Self {
        let mut delimiters = BTreeSet::new();
        let mut names = HashSet::new();
        // A token of white space alone is layout, which text may contain.
        for spelling in spellings.filter(|spelling| !spelling.trim().is_empty()) {
            delimiters.extend(spelling.chars().next());
            delimiters.extend(spelling.chars().last());
            delimiters.extend(spelling.chars().filter(|c| !c.is_ascii() || *c == '|'));
            let mut inner = spelling.chars();
            inner.next();
            inner.next_back();
            let word = spelling.trim_matches(|c| !is_word(c));
            names.extend([inner.as_str(), word].map(String::from));
        }
        // Other inner parts have a delimiter in them.
        names.retain(|name| !name.is_empty() && !name.contains(|c| delimiters.contains(&c)));
        let initials: BTreeSet<char> = names.iter().filter_map(|name| name.chars().next()).collect();
        let mut chars: Vec<char> = delimiters.iter().copied().collect();
        chars.extend(initials.difference(&delimiters));
        Self { chars, num_delimiters: delimiters.len(), names }
    }

    fn stand_in_index(&self, c: char) -> Option<usize> {
        self.chars[..self.num_delimiters].binary_search(&c).ok()
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// The stand-ins of one rendering.
pub struct StandIns<'a> {
    spellings: &'a ControlSpellings,
    base: u32, // the stand-in of spellings.chars[i] is base + i
}

impl<'a> StandIns<'a> {
    /// Takes code points that occur neither in `chat` nor in the template's `source`.
    pub fn new(spellings: &'a ControlSpellings, chat: &Value, source: &str) -> Result<Self> {
        let mut used = BTreeSet::new();
        collect_private(source, &mut used);
        visit_strings(chat, &mut |text| collect_private(text, &mut used));
        let size = spellings.chars.len() as u32;
        let mut base = PRIVATE_BEGIN;
        for code in used {
            if code >= base + size {
                break;
            }
            base = code + 1;
        }
        if base + size > PRIVATE_END {
            return Err("the text uses up Unicode's private-use planes".into());
        }
        Ok(Self { spellings, base })
    }

    pub fn restore(&self, text: &str) -> String {
        text.chars().map(|c| self.original(c).unwrap_or(c)).collect()
    }

    /// The character that `c` stands for.
    pub fn original(&self, c: char) -> Option<char> {
        let index = (c as u32).checked_sub(self.base)?;
        self.spellings.chars.get(index as usize).copied()
    }

    fn stand_in(&self, index: usize) -> char {
        char::from_u32(self.base + index as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
    }

    pub fn hide_messages(&self, messages: &mut Value) {
        for message in messages.as_array_mut().into_iter().flatten() {
            let Some(fields) = message.as_object_mut() else { continue };
            let role = fields.get("role").and_then(Value::as_str).unwrap_or("");
            let is_assistant = role == "assistant";
            // Templates put delimiters around the role on purpose.
            let role_is_plain = role.chars().all(is_word);
            for (key, value) in fields.iter_mut() {
                if !(key == "role" && role_is_plain) {
                    self.hide(value, is_assistant && OWN_WORDS.contains(&key.as_str()));
                }
            }
        }
    }

    /// Puts the stand-ins into every string and key of `value`.
    pub fn hide(&self, value: &mut Value, keep_think_tags: bool) {
        match value {
            Value::String(text) => self.hide_text(text, keep_think_tags),
            Value::Array(items) => items.iter_mut().for_each(|item| self.hide(item, keep_think_tags)),
            Value::Object(fields) => {
                *fields = std::mem::take(fields)
                    .into_iter()
                    .map(|(mut key, mut value)| {
                        self.hide_text(&mut key, false);
                        self.hide(&mut value, keep_think_tags);
                        (key, value)
                    })
                    .collect();
            }
            _ => {}
        }
    }

    fn hide_text(&self, text: &mut String, keep_think_tags: bool) {
        let name = text.trim();
        if self.spellings.names.contains(name) {
            let begin = text.len() - text.trim_start().len();
            let initial = name.chars().next().unwrap_or_default();
            if let Some(index) = self.spellings.chars.iter().position(|c| *c == initial) {
                text.replace_range(begin..begin + initial.len_utf8(), &self.stand_in(index).to_string());
            }
            return;
        }
        if !text.contains(|c| self.spellings.stand_in_index(c).is_some()) {
            return;
        }
        let mut hidden = String::with_capacity(text.len() + text.len() / 8);
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            let tag = THINK_TAGS.iter().find(|tag| keep_think_tags && rest.starts_with(**tag));
            let taken = if let Some(tag) = tag {
                hidden.push_str(tag);
                tag.len()
            } else {
                hidden.push(self.spellings.stand_in_index(c).map_or(c, |index| self.stand_in(index)));
                c.len_utf8()
            };
            rest = &rest[taken..];
        }
        *text = hidden;
    }
}

fn collect_private(text: &str, used: &mut BTreeSet<u32>) {
    used.extend(text.chars().map(|c| c as u32).filter(|code| *code >= PRIVATE_BEGIN));
}

fn visit_strings(value: &Value, visit: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| visit_strings(item, visit)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            visit(key);
            visit_strings(value, visit);
        }),
        _ => {}
    }
}
