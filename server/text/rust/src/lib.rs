//! Tokenizer and chat templates for latentd, behind the C ABI that `../rust_ffi.h` declares.
//!
//! No panic and no borrowed memory crosses the border: every function catches panics and hands errors
//! back as text, and whatever it returns is owned by the caller until it calls the matching `_free`.

mod control;
mod nesting;
mod python;
mod template;
mod tokenizer;

use std::os::raw::c_int;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;

use template::{StrftimeFn, Template};
use tokenizer::Tokenizer;

/// What a call gives: `Err` holds the message for the caller.
pub type Result<T> = std::result::Result<T, String>;

const OK: c_int = 0;
const REFUSED: c_int = 1; // the input's fault
const PANICKED: c_int = 2; // a library's fault

#[repr(C)]
pub struct Bytes {
    data: *mut u8,
    size: usize,
    capacity: usize,
}

#[repr(C)]
pub struct Ids {
    data: *mut u32,
    size: usize,
    capacity: usize,
}

/// Views into a tokenizer, valid as long as it.
#[repr(C)]
pub struct Tables {
    num_ids: usize,
    bytes: *const u8,
    offsets: *const usize, // [num_ids + 1] into bytes
    flags: *const u8,      // [num_ids] tokenizer::SPECIAL | tokenizer::ADDED
}

impl Bytes {
    fn set(&mut self, value: Vec<u8>) {
        let mut value = std::mem::ManuallyDrop::new(value);
        *self = Bytes { data: value.as_mut_ptr(), size: value.len(), capacity: value.capacity() };
    }
}

impl Ids {
    fn set(&mut self, value: Vec<u32>) {
        let mut value = std::mem::ManuallyDrop::new(value);
        *self = Ids { data: value.as_mut_ptr(), size: value.len(), capacity: value.capacity() };
    }
}

/// Runs `f`; puts its error, or what it panicked with, into `error`.
fn guard(error: *mut Bytes, f: impl FnOnce() -> Result<()>) -> c_int {
    // The default hook would print what we report as an error of one call.
    static HOOK: Once = Once::new();
    HOOK.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let (status, message) = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => return OK,
        Ok(Err(message)) => (REFUSED, message),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            (PANICKED, message.unwrap_or_else(|| "panic".into()))
        }
    };
    // SAFETY: `error` is valid by the contract of every function below.
    unsafe { (*error).set(message.into_bytes()) };
    status
}

/// SAFETY: `data` points at `size` readable bytes, or `size` is 0.
unsafe fn slice<'a>(data: *const u8, size: usize) -> &'a [u8] {
    if size == 0 {
        &[]
    } else {
        std::slice::from_raw_parts(data, size)
    }
}

unsafe fn text<'a>(data: *const u8, size: usize) -> Result<&'a str> {
    std::str::from_utf8(slice(data, size))
        .map_err(|e| format!("text is not UTF-8 at byte {}", e.valid_up_to()))
}

#[no_mangle]
pub unsafe extern "C" fn latentd_bytes_free(bytes: *mut Bytes) {
    let b = &mut *bytes;
    if !b.data.is_null() {
        drop(Vec::from_raw_parts(b.data, b.size, b.capacity));
        b.data = std::ptr::null_mut();
    }
}

#[no_mangle]
pub unsafe extern "C" fn latentd_ids_free(ids: *mut Ids) {
    let i = &mut *ids;
    if !i.data.is_null() {
        drop(Vec::from_raw_parts(i.data, i.size, i.capacity));
        i.data = std::ptr::null_mut();
    }
}

#[no_mangle]
pub unsafe extern "C" fn latentd_tokenizer_new(
    json: *const u8,
    size: usize,
    out: *mut *mut Tokenizer,
    error: *mut Bytes,
) -> c_int {
    guard(error, || {
        let tokenizer = Tokenizer::new(slice(json, size))?;
        *out = Box::into_raw(Box::new(tokenizer));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn latentd_tokenizer_free(tokenizer: *mut Tokenizer) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

#[no_mangle]
pub unsafe extern "C" fn latentd_tokenizer_tables(tokenizer: *const Tokenizer) -> Tables {
    let t = &*tokenizer;
    Tables {
        num_ids: t.flags.len(),
        bytes: t.bytes.as_ptr(),
        offsets: t.offsets.as_ptr(),
        flags: t.flags.as_ptr(),
    }
}

#[no_mangle]
pub unsafe extern "C" fn latentd_tokenizer_token_id(
    tokenizer: *const Tokenizer,
    token: *const u8,
    size: usize,
) -> i64 {
    match std::str::from_utf8(slice(token, size)) {
        Ok(token) => (*tokenizer).token_id(token).map_or(-1, i64::from),
        Err(_) => -1,
    }
}

#[no_mangle]
pub unsafe extern "C" fn latentd_tokenizer_encode(
    tokenizer: *const Tokenizer,
    data: *const u8,
    size: usize,
    parse_control_tokens: bool,
    out: *mut Ids,
    error: *mut Bytes,
) -> c_int {
    guard(error, || {
        let ids = (*tokenizer).encode(text(data, size)?, parse_control_tokens)?;
        (*out).set(ids);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn latentd_template_new(
    source: *const u8,
    size: usize,
    strftime: StrftimeFn,
    out: *mut *mut Template,
    error: *mut Bytes,
) -> c_int {
    guard(error, || {
        let template = Template::new(text(source, size)?, strftime)?;
        *out = Box::into_raw(Box::new(template));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn latentd_template_free(template: *mut Template) {
    if !template.is_null() {
        drop(Box::from_raw(template));
    }
}

#[no_mangle]
pub unsafe extern "C" fn latentd_template_render(
    template: *const Template,
    tokenizer: *const Tokenizer,
    chat: *const u8,
    size: usize,
    out_text: *mut Bytes,
    out_ids: *mut Ids,
    error: *mut Bytes,
) -> c_int {
    guard(error, || {
        let (text, ids) = (*template).render(&*tokenizer, slice(chat, size))?;
        (*out_text).set(text.into_bytes());
        (*out_ids).set(ids);
        Ok(())
    })
}
