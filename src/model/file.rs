pub const SHIPPED: &[(&str, &str)] = &[];
pub fn load() {}
