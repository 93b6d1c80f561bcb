//! Chat templates as Transformers renders them, within bounds.

use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value};

use crate::control::StandIns;
use crate::nesting;
use crate::python;
use crate::tokenizer::Tokenizer;
use crate::Result;

/// `strftime(format, size, out, capacity)`: the local time; returns the length, at most `capacity`.
pub type StrftimeFn = extern "C" fn(*const u8, usize, *mut u8, usize) -> usize;

/// Fuel pays for instructions and, one a 64 bytes, for the data that a template makes. A template of the
/// usual kind needs about 100 a message; the base lets a short conversation through a long template.
const BASE_FUEL: u64 = 1_000_000;
const FUEL_PER_INPUT_BYTE: u64 = 8;
const MAX_FUEL: u64 = 4_000_000;

/// Compiling a chain of operators takes the square of its length.
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Enough for the deepest chain of operators in MAX_SOURCE_BYTES, at which the library's parser recurses.
/// Address space: only what is used costs memory.
const STACK_BYTES: usize = 256 << 20;

const TEMPLATE_NAME: &str = "chat_template";
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Older names first-come for a message's reasoning; templates read the first of these.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

pub struct Template {
    env: Environment<'static>,
    source: String,
}

impl Template {
    pub fn new(source: &str, strftime: StrftimeFn) -> Result<Self> {
        let source = without_generation_tags(source);
        let mut env = Environment::new();
        let syntax = minijinja::syntax::SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .keep_trailing_newline(false)
            .build()
            .map_err(|e| e.to_string())?;
        env.set_syntax(syntax.clone());
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_formatter(python::print);
        env.set_unknown_method_callback(unknown_method);
        env.add_filter("tojson", python::tojson);
        env.add_function("raise_exception", |message: String| -> std::result::Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", move |format: String| {
            let mut out = vec![0; 256];
            let size = strftime(format.as_ptr(), format.len(), out.as_mut_ptr(), out.len());
            out.truncate(size);
            String::from_utf8_lossy(&out).into_owned()
        });
        if source.len() > MAX_SOURCE_BYTES {
            return Err(format!("has {} bytes; the limit is {MAX_SOURCE_BYTES}", source.len()));
        }
        on_big_stack(|| {
            nesting::check(&source, syntax)?;
            env.add_template_owned(TEMPLATE_NAME, source.clone()).map_err(|e| describe(&e))
        })?;
        Ok(Self { env, source })
    }

    /// `chat`: {messages, tools, kwargs, special_tokens, add_generation_prompt, continue_final_message,
    /// parse_control_tokens}. Gives the text and its token ids.
    pub fn render(&self, tokenizer: &Tokenizer, chat: &[u8]) -> Result<(String, Vec<u32>)> {
        let input_size = chat.len() as u64;
        let mut chat: Value = serde_json::from_slice(chat).map_err(|e| e.to_string())?;
        prepare_messages(&mut chat["messages"])?;
        check_kwargs(&chat["kwargs"])?;
        if chat["parse_control_tokens"] == true {
            let text = self.render_text(&mut chat, input_size)?;
            let ids = tokenizer.encode(&text, true)?;
            return Ok((text, ids));
        }
        let stand_ins = StandIns::new(&tokenizer.control, &chat, &self.source)?;
        stand_ins.hide_messages(&mut chat["messages"]);
        stand_ins.hide(&mut chat["tools"], false);
        stand_ins.hide(&mut chat["kwargs"], false);
        let text = self.render_text(&mut chat, input_size).map_err(|e| stand_ins.restore(&e))?;
        let ids = tokenizer.encode_restoring(&text, |part| stand_ins.restore(part))?;
        Ok((stand_ins.restore(&text), ids))
    }

    fn render_text(&self, chat: &mut Value, input_size: u64) -> Result<String> {
        let continued = match chat["continue_final_message"] == true {
            true => Some(self.tag_final_message(&mut chat["messages"])?),
            false => None,
        };
        // Later ones win: kwargs over special tokens, as in Transformers.
        let mut context = Map::new();
        for key in ["special_tokens", "kwargs"] {
            if let Value::Object(values) = chat[key].take() {
                context.extend(values);
            }
        }
        context.insert("documents".into(), Value::Null);
        for key in ["messages", "tools", "add_generation_prompt"] {
            context.insert(key.into(), chat[key].take());
        }
        let mut env = self.env.clone();
        env.set_fuel(Some((BASE_FUEL + FUEL_PER_INPUT_BYTE * input_size).min(MAX_FUEL)));
        let text = env
            .get_template(TEMPLATE_NAME)
            .and_then(|template| template.render(Serde(Value::Object(context))))
            .map_err(|e| describe(&e))?;
        match continued {
            Some(message) => cut_at_tag(text, &message),
            None => Ok(text),
        }
    }

    /// Marks where the final message ends; returns its text.
    fn tag_final_message(&self, messages: &mut Value) -> Result<String> {
        if !self.source.contains("content") {
            return Err("continue_final_message: the template does not render `content`".into());
        }
        let last = messages.as_array_mut().and_then(|messages| messages.last_mut());
        let last = last.ok_or("continue_final_message: there are no messages")?;
        let content = match &mut last["content"] {
            Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
            content => Some(content),
        };
        match content {
            Some(Value::String(text)) => {
                let original = text.clone();
                text.push_str(CONTINUE_TAG);
                Ok(original)
            }
            _ => Err("continue_final_message: the final message has no content to continue".into()),
        }
    }
}

/// Runs `f` on a stack that no template's source exhausts.
fn on_big_stack<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, f);
        let done = thread.map_err(|e| format!("no thread for the template: {e}"))?.join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Python's string methods. `str.format` would allocate any width before it is charged for it.
fn unknown_method(
    state: &mut minijinja::State,
    value: &minijinja::Value,
    method: &str,
    args: &[minijinja::Value],
) -> std::result::Result<minijinja::Value, Error> {
    let is_wide = |text: &str| text.split(|c: char| !c.is_ascii_digit()).any(|number| number.len() > 4);
    if method == "format" && value.as_str().is_some_and(is_wide) {
        return Err(Error::new(ErrorKind::InvalidOperation, "format: a width has more than 4 digits"));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// As Transformers: cuts before the tag; where the template trimmed the message, trims what is before too.
fn cut_at_tag(mut text: String, message: &str) -> Result<String> {
    let place = text.rfind(CONTINUE_TAG.trim_end()).filter(|_| text.contains(message.trim()));
    let Some(place) = place else {
        return Err("continue_final_message: the template does not render the final message whole".into());
    };
    let is_whole = text[place..].starts_with(CONTINUE_TAG);
    text.truncate(place);
    if !is_whole {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

fn prepare_messages(messages: &mut Value) -> Result<()> {
    let Value::Array(messages) = messages else {
        return Err("messages is not an array".into());
    };
    for message in messages {
        let Value::Object(fields) = message else {
            return Err("messages has an element that is not an object".into());
        };
        // A template that iterates over them would fail on null, and lose the content on an empty list.
        if fields.get("tool_calls").is_some_and(|calls| calls.is_null() || calls == &Value::Array(vec![])) {
            fields.shift_remove("tool_calls");
        }
        let reasoning = REASONING_FIELDS.iter().filter_map(|name| fields.get(*name)).find(|v| !v.is_null());
        if let Some(reasoning) = reasoning.cloned() {
            fields.entry("thinking").or_insert(reasoning.clone());
            fields.insert("reasoning_content".into(), reasoning);
        }
    }
    Ok(())
}

fn check_kwargs(kwargs: &Value) -> Result<()> {
    match kwargs.as_object().and_then(|kwargs| RESERVED.iter().find(|name| kwargs.contains_key(**name))) {
        Some(name) => Err(format!("kwargs: `{name}` is a field of its own")),
        None => Ok(()),
    }
}

/// Transformers' `{% generation %}` block only marks its text for training.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        let Some(size) = rest[begin..].find("%}") else { break };
        let tag = &rest[begin + 2..begin + size];
        let (plain, replacement) = match tag.trim_matches(['-', '+']).trim() {
            "generation" => ("generation", "if true"),
            "endgeneration" => ("endgeneration", "endif"),
            _ => ("", ""),
        };
        out.push_str(&rest[..begin + 2]);
        match plain {
            "" => out.push_str(tag),
            _ => out.push_str(&tag.replacen(plain, replacement, 1)),
        }
        rest = &rest[begin + size..];
    }
    out + rest
}

/// The template's own message, and where it came from.
fn describe(error: &Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (template line {line})"),
        None => what,
    }
}
