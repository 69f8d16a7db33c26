//! Checks the header of a GGUF file before it is read: what it claims must fit into the file.
//!
//! Layout: magic `GGUF`, version (u32), numbers of tensors and of metadata entries, the entries (key, type, value), and for
//! each tensor its name, sizes, type and offset. Numbers are little-endian; lengths have 4 bytes in version 1, 8 later.

use std::io::{Read, Seek, SeekFrom};

/// Largest nesting of arrays.
const DEPTH_MAX: u32 = 4;
/// Types of values whose sizes are fixed, in bytes, by their number; 0 for strings (8) and arrays (9).
const SIZES: [u64; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
const STRING: u32 = 8;
const ARRAY: u32 = 9;

struct Header<'a, R> {
    reader: &'a mut R,
    left: u64,
    wide: bool,
}

/// Checks a header; an error says what is wrong.
pub fn check<R: Read + Seek>(reader: &mut R) -> Result<(), String> {
    let io = |e: std::io::Error| e.to_string();
    let size = reader.seek(SeekFrom::End(0)).map_err(io)?;
    reader.rewind().map_err(io)?;
    let mut header = Header { reader, left: size, wide: true };
    if header.bytes::<4>()? != *b"GGUF" {
        return Err("it does not begin with `GGUF`".into());
    }
    let version = header.u32()?;
    if !(1..=3).contains(&version) {
        return Err(format!("version {version} of GGUF is not supported; 1 to 3 are"));
    }
    header.wide = version > 1;
    let (tensors, entries) = (header.length()?, header.length()?);
    for _ in 0..entries {
        let key = header.string()?;
        let kind = header.u32()?;
        if key == b"general.alignment" {
            let width = SIZES.get(kind as usize).copied().unwrap_or(0);
            let value = header.number(width)?;
            if value == 0 || value > 1 << 20 {
                return Err(format!("`general.alignment` is {value}; it must be from 1 to 1048576"));
            }
        } else {
            header.value(kind, 0)?;
        }
    }
    for _ in 0..tensors {
        let name = header.string()?;
        let dimensions = header.u32()?;
        if dimensions > 4 {
            let name = String::from_utf8_lossy(&name).into_owned();
            return Err(format!("tensor `{name}` has {dimensions} dimensions; 4 are the most"));
        }
        let mut elements = 1u64;
        for _ in 0..dimensions {
            let size = header.length()?;
            elements = elements.checked_mul(size).filter(|n| *n <= size_limit(header.left)).ok_or_else(|| {
                let name = String::from_utf8_lossy(&name).into_owned();
                format!("tensor `{name}` claims to be larger than the file")
            })?;
        }
        // candle makes a slice of its data, which must not be empty.
        if elements == 0 {
            return Err(format!("tensor `{}` has no elements", String::from_utf8_lossy(&name)));
        }
        header.skip(4 + 8)?; // type and offset
    }
    Ok(())
}

/// Most elements that so many bytes can hold: no type takes less than an eighth of a byte.
fn size_limit(bytes: u64) -> u64 {
    bytes.saturating_mul(8)
}

impl<R: Read + Seek> Header<'_, R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.claim(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn claim(&mut self, bytes: u64) -> Result<(), String> {
        self.left = self
            .left
            .checked_sub(bytes)
            .ok_or("its header claims more than the file holds; it is truncated or damaged")?;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn length(&mut self) -> Result<u64, String> {
        if self.wide { Ok(u64::from_le_bytes(self.bytes()?)) } else { Ok(u64::from(self.u32()?)) }
    }

    /// A number of a width in bytes.
    fn number(&mut self, width: u64) -> Result<u64, String> {
        let mut bytes = [0; 8];
        if width == 0 || width > 8 {
            return Err("`general.alignment` is not a number".into());
        }
        self.claim(width)?;
        self.reader.read_exact(&mut bytes[..width as usize]).map_err(|e| e.to_string())?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn string(&mut self) -> Result<Vec<u8>, String> {
        let len = self.length()?;
        self.claim(len)?;
        let mut bytes = vec![0; len as usize];
        self.reader.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), String> {
        self.claim(bytes)?;
        self.reader.seek_relative(bytes as i64).map_err(|e| e.to_string())
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<(), String> {
        match kind {
            STRING => {
                let len = self.length()?;
                self.skip(len)
            }
            ARRAY if depth < DEPTH_MAX => {
                let (kind, count) = (self.u32()?, self.length()?);
                match SIZES.get(kind as usize) {
                    Some(0) => (0..count).try_for_each(|_| self.value(kind, depth + 1)),
                    Some(size) => self.skip(size.saturating_mul(count)),
                    None => Err(format!("a value has the unknown type {kind}")),
                }
            }
            ARRAY => Err(format!("arrays are nested more than {DEPTH_MAX} deep")),
            _ => match SIZES.get(kind as usize) {
                Some(size) => self.skip(*size),
                None => Err(format!("a value has the unknown type {kind}")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn file(entries: &[(&str, u32, &[u8])], tensors: u64) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend((entries.len() as u64).to_le_bytes());
        for (key, kind, value) in entries {
            bytes.extend((key.len() as u64).to_le_bytes());
            bytes.extend(key.as_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(*value);
        }
        bytes
    }

    fn refused(bytes: Vec<u8>) -> String {
        check(&mut Cursor::new(bytes)).unwrap_err()
    }

    #[test]
    fn claims_that_do_not_fit_are_refused() {
        assert!(check(&mut Cursor::new(file(&[("general.alignment", 4, &32u32.to_le_bytes())], 0))).is_ok());
        assert!(refused(file(&[("general.alignment", 4, &0u32.to_le_bytes())], 0)).contains("general.alignment"));
        let long = [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        assert!(refused(file(&[("list", ARRAY, &long)], 0)).contains("more than the file holds"));
        assert!(refused(file(&[("text", STRING, &u64::MAX.to_le_bytes())], 0)).contains("more than the file holds"));
        let nested = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat().repeat(9);
        assert!(refused(file(&[("deep", ARRAY, &nested)], 0)).contains("nested"));
        assert!(refused(file(&[("odd", 77, &[])], 0)).contains("unknown type 77"));
        assert!(refused(b"nothing".to_vec()).contains("GGUF"));
        let mut tensor = file(&[], 1);
        tensor.extend(1u64.to_le_bytes());
        tensor.push(b'w');
        tensor.extend(2u32.to_le_bytes());
        tensor.extend([1u64 << 40, 1 << 40].map(u64::to_le_bytes).concat());
        tensor.extend([0; 12]);
        assert!(refused(tensor).contains("larger than the file"));
    }
}
