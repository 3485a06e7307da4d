//! The header of a safetensors file, checked more strictly than the format's own library does: no byte of the data
//! belongs to two tensors or to none, and no name appears twice.

use std::{fmt, ops::Range};

use serde::{
    Deserialize,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};

use super::Error;

/// Largest header that is believed (the format's own limit).
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Element types that stand in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3FN.
    F8E4M3,
    /// Something the network never uses, of so many bits.
    Other(u32),
}

impl ElementType {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "F32" => Self::F32,
            "BF16" => Self::Bf16,
            "F8_E4M3" => Self::F8E4M3,
            "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E8M0" => Self::Other(8),
            "U16" | "I16" | "F16" => Self::Other(16),
            "U32" | "I32" => Self::Other(32),
            "U64" | "I64" | "F64" | "C64" => Self::Other(64),
            "F4" => Self::Other(4),
            _ => return None,
        })
    }

    fn bits(self) -> u64 {
        match self {
            Self::F32 => 32,
            Self::Bf16 => 16,
            Self::F8E4M3 => 8,
            Self::Other(bits) => bits.into(),
        }
    }
}

/// A tensor of a file.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: String,
    pub(super) dtype: ElementType,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

/// What is wrong with a header, and with which tensor's entry.
#[derive(Debug)]
pub(super) struct Flaw {
    tensor: Option<String>,
    detail: String,
}

impl Flaw {
    pub(super) fn in_file(self, file: &str) -> Error {
        let (file, detail) = (file.to_owned(), self.detail);
        match self.tensor {
            Some(tensor) => Error::Tensor {
                file,
                tensor,
                detail,
            },
            None => Error::File { file, detail },
        }
    }
}

fn flaw(detail: String) -> Flaw {
    Flaw {
        tensor: None,
        detail,
    }
}

/// Reads the header of a whole file: where its data begins, and its tensors in the order of their data.
pub(super) fn parse(file: &[u8]) -> Result<(usize, Vec<Found>), Flaw> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(flaw(format!(
            "{} bytes are too few for a safetensors file",
            file.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(flaw(format!("header of {length} bytes is absurd")));
    }
    let length = length as usize;
    if length > rest.len() {
        let detail = format!(
            "header of {length} bytes in a file of {}: truncated",
            file.len()
        );
        return Err(flaw(detail));
    }
    let (header, data) = rest.split_at(length);
    if header.first() != Some(&b'{') {
        return Err(flaw("header does not begin with {".into()));
    }
    let Entries(entries) =
        serde_json::from_slice(header).map_err(|e| flaw(format!("header: {e}")))?;
    let mut found = entries
        .into_iter()
        .map(|(name, entry)| match entry.check() {
            Ok((dtype, shape, bytes)) => Ok(Found {
                name,
                dtype,
                shape,
                bytes,
            }),
            Err(detail) => Err(Flaw {
                tensor: Some(name),
                detail,
            }),
        })
        .collect::<Result<Vec<_>, _>>()?;
    found.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = found.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Flaw {
            tensor: Some(pair[0].name.clone()),
            detail: "stands twice in the header".into(),
        });
    }
    found.sort_by_key(|tensor| tensor.bytes.start);
    contiguous(&found, data.len())?;
    Ok((8 + length, found))
}

/// Each tensor begins where the one before ends, and the last ends with the file.
fn contiguous(found: &[Found], size: usize) -> Result<(), Flaw> {
    let mut end = 0;
    for (number, tensor) in found.iter().enumerate() {
        let Range { start, end: next } = tensor.bytes;
        let detail = if next > size {
            format!("bytes {start}..{next} lie outside the {size} bytes of data: truncated")
        } else if start < end {
            format!(
                "bytes {start}..{next} overlap tensor {}",
                found[number - 1].name
            )
        } else if start > end {
            format!("bytes {end}..{start} before it belong to no tensor")
        } else {
            end = next;
            continue;
        };
        return Err(Flaw {
            tensor: Some(tensor.name.clone()),
            detail,
        });
    }
    if end != size {
        return Err(flaw(format!(
            "{} bytes at the end belong to no tensor",
            size - end
        )));
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryJson {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl EntryJson {
    fn check(self) -> Result<(ElementType, Vec<usize>, Range<usize>), String> {
        let dtype = ElementType::parse(&self.dtype)
            .ok_or_else(|| format!("element type \"{}\" is unknown", self.dtype))?;
        let overflow = || format!("shape {:?} overflows", self.shape);
        let bits = self
            .shape
            .iter()
            .try_fold(dtype.bits(), |bits, &dim| bits.checked_mul(dim))
            .ok_or_else(overflow)?;
        if bits == 0 {
            return Err(format!("shape {:?} has no elements", self.shape));
        }
        let [start, end] = self.data_offsets;
        if start > end {
            return Err(format!("offsets {start}..{end} are reversed"));
        }
        if !bits.is_multiple_of(8) || bits / 8 != end - start {
            return Err(format!(
                "offsets {start}..{end} hold {} bytes, but {} {:?} needs {}",
                end - start,
                self.dtype,
                self.shape,
                bits.div_ceil(8)
            ));
        }
        let shape = self
            .shape
            .iter()
            .map(|&dim| usize::try_from(dim))
            .collect::<Result<_, _>>();
        match (shape, usize::try_from(start), usize::try_from(end)) {
            (Ok(shape), Ok(start), Ok(end)) => Ok((dtype, shape, start..end)),
            _ => Err(overflow()),
        }
    }
}

/// The header's object with its keys as they stand, doubles included.
struct Entries(Vec<(String, EntryJson)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format_args!("tensor {name}: {e}")))?;
                    entries.push((name, entry));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Object)
    }
}
