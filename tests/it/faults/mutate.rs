//! Files with a few changes.

use arbitrary::Unstructured;
use serde_json::{Value, json};

/// Words that parsers stumble over.
const WORDS: [&str; 24] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "-0.0",
    "NaN",
    "18446744073709551616",
    "9223372036854775807",
    "4294967296",
    "\"\"",
    "[]",
    "{}",
    "[[[[[[[[",
    "\u{0}",
    "\u{fffd}",
    "\"\\ud800\"",
    "1.5",
    "..",
    "/",
    "\n",
    "\"F32\"",
    "\"shape\":[0]",
    "\"data_offsets\":[8,4]",
];

/// A file with a few changes, most of them in its first bytes, where headers are.
pub fn changed(original: &[u8], u: &mut Unstructured) -> arbitrary::Result<Vec<u8>> {
    let mut bytes = original.to_vec();
    for _ in 0..u.int_in_range(1..=4)? {
        let most = if u.ratio(3, 4)? { bytes.len().min(2000) } else { bytes.len() };
        let at = u.int_in_range(0..=most)?;
        let end = (at + u.int_in_range(0..=24usize)?).min(bytes.len());
        match u.int_in_range(0..=7u8)? {
            0 if at < bytes.len() => bytes[at] = u.arbitrary()?,
            1 if at < bytes.len() => bytes[at] ^= 1 << u.int_in_range(0..=7u8)?,
            2 => drop(bytes.splice(at..at, u.choose(&WORDS)?.bytes())),
            3 => drop(bytes.splice(at..end, u.choose(&WORDS)?.bytes())),
            4 => drop(bytes.drain(at..end)),
            5 => {
                let piece = bytes[at..end].to_vec();
                let to = u.int_in_range(0..=bytes.len())?;
                drop(bytes.splice(to..to, piece));
            }
            // A number by another.
            6 => {
                let digit = |i: &usize| bytes[*i].is_ascii_digit();
                if let Some(first) = (at..bytes.len()).find(digit) {
                    let last = (first..bytes.len()).find(|i| !digit(i)).unwrap_or(bytes.len());
                    drop(bytes.splice(first..last, u.choose(&WORDS)?.bytes()));
                }
            }
            _ if u.ratio(1, 4)? => bytes.truncate(at),
            _ => {}
        }
    }
    Ok(bytes)
}

/// A value that a field of JSON might hold and should not.
fn odd_value(u: &mut Unstructured) -> arbitrary::Result<Value> {
    Ok(match u.int_in_range(0..=15u8)? {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(0),
        3 => json!(1),
        4 => json!(1u64 << u.int_in_range(2..=63u32)?),
        5 => json!(1e300),
        6 => json!(-0.5),
        7 => json!(u.arbitrary::<u16>()?),
        8 => json!(""),
        9 => json!([]),
        10 => json!({}),
        11 => json!([1, 2, 3, 4, 5, 6, 7, 8]),
        12 => json!([[0]]),
        13 => json!(true),
        14 => json!("x"),
        _ => json!([u.arbitrary::<u8>()?, u.arbitrary::<u32>()?]),
    })
}

/// Changes a value, or one within it.
fn change_value(value: &mut Value, u: &mut Unstructured) -> arbitrary::Result<()> {
    let (nested, deeper) = (value.is_object() || value.is_array(), u.ratio(9, 10)?);
    match value {
        Value::Object(fields) if deeper && !fields.is_empty() => {
            let at = u.int_in_range(0..=fields.len() - 1)?;
            let key = fields.keys().nth(at).unwrap().clone();
            if u.ratio(1, 10)? {
                fields.remove(&key);
            } else {
                change_value(&mut fields[&key], u)?;
            }
        }
        Value::Array(items) if deeper && !items.is_empty() => {
            let at = u.int_in_range(0..=items.len() - 1)?;
            match u.int_in_range(0..=9u8)? {
                0 => drop(items.remove(at)),
                1 => items.insert(at, odd_value(u)?),
                _ => change_value(&mut items[at], u)?,
            }
        }
        _ if nested && u.ratio(1, 2)? => {}
        _ => *value = odd_value(u)?,
    }
    Ok(())
}

/// A file of JSON, or a safetensors file by its header, with odd values; nothing of other files.
pub fn changed_values(original: &[u8], u: &mut Unstructured) -> arbitrary::Result<Option<Vec<u8>>> {
    let length = original.first_chunk().map(|n| u64::from_le_bytes(*n) as usize);
    let header = length.and_then(|n| original.get(8..8usize.checked_add(n)?));
    let of_header = header.and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
    let Some(mut value) = of_header.clone().or_else(|| serde_json::from_slice(original).ok())
    else {
        return Ok(None);
    };
    for _ in 0..u.int_in_range(1..=3)? {
        change_value(&mut value, u)?;
    }
    let text = value.to_string().into_bytes();
    Ok(Some(match (of_header, length) {
        (Some(_), Some(n)) => {
            [&(text.len() as u64).to_le_bytes()[..], &text, &original[8 + n..]].concat()
        }
        _ => text,
    }))
}
