//! HPACK's Huffman code (RFC 7541, appendix B), as far as the adapter needs it.
//!
//! The code is canonical: the lengths of the codes determine the codes.

/// How many bits each byte's code has. The last is the end-of-string symbol, which no string contains.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

const END_OF_STRING: u16 = 256;
const LONGEST: usize = 30;

/// The symbols in the order of their codes, and where each length begins.
struct Codes {
    symbols: [u16; 257],
    /// Of each length: the first code, how many codes there are, and where their symbols begin.
    lengths: [(u32, u32, usize); LONGEST + 1],
}

const CODES: Codes = Codes::new();

impl Codes {
    const fn new() -> Self {
        let mut codes = Self { symbols: [0; 257], lengths: [(0, 0, 0); LONGEST + 1] };
        let (mut length, mut code, mut at) = (1, 0, 0);
        while length <= LONGEST {
            codes.lengths[length] = (code, 0, at);
            let mut symbol = 0;
            while symbol < LENGTHS.len() {
                if LENGTHS[symbol] as usize == length {
                    codes.symbols[at] = symbol as u16;
                    codes.lengths[length].1 += 1;
                    code += 1;
                    at += 1;
                }
                symbol += 1;
            }
            code <<= 1;
            length += 1;
        }
        codes
    }
}

/// The bytes that `coded` stands for; nothing where it is not valid. At most 8/5 of its length.
pub(super) fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(coded.len() * 8 / 5);
    let (mut code, mut length) = (0_u32, 0);
    for bit in coded.iter().flat_map(|byte| (0..8).rev().map(move |shift| byte >> shift & 1)) {
        code = code << 1 | u32::from(bit);
        length += 1;
        let (first, count, at) = *CODES.lengths.get(length)?;
        let Some(offset) = code.checked_sub(first).filter(|offset| *offset < count) else {
            continue;
        };
        let symbol = CODES.symbols[at + offset as usize];
        if symbol == END_OF_STRING {
            return None;
        }
        decoded.push(symbol as u8);
        (code, length) = (0, 0);
    }
    // What fills the last byte are the first bits of the end-of-string symbol: ones.
    (length < 8 && code == (1 << length) - 1).then_some(decoded)
}

/// A string of `count` zeros, coded. Nothing of the same length has a shorter code: 5 bits each.
pub(super) fn zeros(count: usize) -> Vec<u8> {
    let bits = count * 5;
    let mut coded = vec![0; bits.div_ceil(8)];
    let filling = coded.len() * 8 - bits;
    if let Some(last) = coded.last_mut() {
        *last = (1 << filling) - 1;
    }
    coded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_specification_decode() {
        // RFC 7541, C.4 and C.6.
        for (coded, text) in [
            ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
            ("a8eb10649cbf", "no-cache"),
            ("25a849e95ba97d7f", "custom-key"),
            ("25a849e95bb8e8b4bf", "custom-value"),
            ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
            ("", ""),
        ] {
            let bytes: Vec<u8> = (0..coded.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&coded[at..at + 2], 16).unwrap())
                .collect();
            assert_eq!(decode(&bytes).as_deref(), Some(text.as_bytes()), "{coded}");
        }
    }

    #[test]
    fn what_is_no_code_is_refused() {
        // The end-of-string symbol; a whole byte of filling; filling that is not ones.
        for wrong in [&[0xff; 4][..], &[0x07, 0xff], &[0x00]] {
            assert_eq!(decode(wrong), None, "{wrong:x?}");
        }
        assert_eq!(decode(&[0x07]).as_deref(), Some(&b"0"[..]));
    }

    #[test]
    fn zeros_decode_to_as_many_zeros() {
        for count in 0..200 {
            let coded = zeros(count);
            assert_eq!(decode(&coded), Some(vec![b'0'; count]));
            assert!(coded.len() <= count);
        }
    }
}
