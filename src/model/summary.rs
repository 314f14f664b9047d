pub fn summary(){}
