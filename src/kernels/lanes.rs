//! Shaders that handle channels or elements four at a time, or one at a time where they do not come in
//! fours.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

/// What a shader's text says of its lanes, and what it says instead for one lane.
const ONE_LANE: [[&str; 2]; 7] = [
    ["alias Lanes = vec4<f32>;", "alias Lanes = f32;"],
    ["alias Stored = vec4<real>;", "alias Stored = real;"],
    ["alias Words = vec4<u32>;", "alias Words = u32;"],
    ["alias Flags = vec4<bool>;", "alias Flags = bool;"],
    ["const LANES = 4u;", "const LANES = 1u;"],
    ["return lanes.x;", "return lanes;"],
    ["return dot(lanes, Lanes(1.0));", "return lanes;"],
];

/// How many go together where `count` channels (or elements) lie side by side.
pub fn lanes(count: usize) -> usize {
    if count.is_multiple_of(4) { 4 } else { 1 }
}

/// The shader `text`, written for four lanes, for as many as [`lanes`] says.
pub fn with_lanes(text: &'static str, count: usize) -> &'static str {
    static ONE: LazyLock<Mutex<HashMap<&str, &str>>> = LazyLock::new(Mutex::default);
    if lanes(count) == 4 {
        return text;
    }
    let mut texts = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    // There are few such shaders, and they are all that is ever leaked.
    texts.entry(text).or_insert_with(|| {
        let [from, to] = ONE_LANE[0];
        assert!(text.contains(from), "a shader without lanes");
        let text = ONE_LANE[1..]
            .iter()
            .fold(text.replace(from, to), |text, [from, to]| {
                text.replace(from, to)
            });
        text.leak()
    })
}
