//! Safetensors files.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor, safetensors};
use serde_json::Value;

use crate::{Error, Result};

/// The tensors of a safetensors file that has been read. `path` is for messages.
///
/// # Errors
///
/// [`Error::Malformed`]: a file that is shorter than its header says is `truncated`.
pub fn tensors_of(bytes: &[u8], path: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    let malformed = |reason: String| Error::Malformed { path: path.into(), reason };
    if let Some(whole) = claimed_length(bytes)
        && whole > bytes.len() as u64
    {
        let (found, whole) = (grouped(bytes.len() as u64), grouped(whole));
        return Err(malformed(format!("truncated: {found} of {whole} bytes; copy or download the file again")));
    }
    safetensors::load_buffer(bytes, device).map_err(|e| malformed(first_line(&e)))
}

/// Length of the whole file by its header; `None` if the header cannot be read. Of a header that is cut off itself, the
/// length of what can be known.
fn claimed_length(bytes: &[u8]) -> Option<u64> {
    let header = u64::from_le_bytes(*bytes.first_chunk::<8>()?);
    let start = header.checked_add(8)?;
    // No header is larger; such a number is no length at all.
    if header > 100_000_000 {
        return None;
    }
    let Some(text) = bytes.get(8..start as usize) else { return Some(start) };
    let header: Value = serde_json::from_slice(text).ok()?;
    let ends = header.as_object()?.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
    start.checked_add(ends.max().unwrap_or(0))
}

/// A number with its digits in groups of three.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Message of a tensor error without the backtrace that it may carry.
fn first_line(e: &candle_core::Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_off_anywhere_says_how_much_is_missing() {
        let tensor = Tensor::zeros((30, 50), candle_core::DType::F32, &Device::Cpu).unwrap();
        let whole = ::safetensors::serialize([("x", &tensor)], None).unwrap();
        let load = |bytes: &[u8]| tensors_of(bytes, Path::new("x.safetensors"), &Device::Cpu);
        assert_eq!(load(&whole).unwrap()["x"].dims(), [30, 50]);
        let header = whole.len() - 6000;
        for cut in [header - 10, header, header + 1, whole.len() - 1] {
            let error = load(&whole[..cut]).unwrap_err().to_string();
            assert!(error.contains("truncated: "), "{cut}: {error}");
        }
        let error = load(&whole[..whole.len() - 1]).unwrap_err().to_string();
        let wanted = format!("truncated: {} of {} bytes", grouped(whole.len() as u64 - 1), grouped(whole.len() as u64));
        assert!(error.contains(&wanted), "{error}");
        assert!(load(b"no tensors at all").is_err() && load(b"").is_err());
        assert_eq!([grouped(7), grouped(1234), grouped(1_000_000)], ["7", "1,234", "1,000,000"]);
    }
}
