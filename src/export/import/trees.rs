//! Activations: one node, or the several that exporters write for one.

use super::attributes::{float, known, text};
use super::constants::Constant;
use super::{Found, Reader, printable};
use crate::export::onnx::Tree;
use crate::model::Activation;

impl<'a> Reader<'a> {
    /// The activation that a node is, or the last node of, what it is of, and its nodes.
    pub(super) fn activation(
        &mut self,
        i: usize,
    ) -> Found<Option<(Activation, &'a str, Vec<usize>)>> {
        if let Some(found) = self.trees.remove(&i) {
            return Ok(Some(found));
        }
        let node = &self.graph.node[i];
        let activation = match node.op_type.as_str() {
            "Relu" => Activation::Relu,
            "Tanh" => Activation::Tanh,
            "HardSwish" => Activation::HardSwish,
            "Sigmoid" => Activation::Sigmoid,
            "LeakyRelu" => Activation::LeakyRelu {
                slope: float(node, "alpha").unwrap_or(0.01),
            },
            "Swish" if float(node, "alpha").unwrap_or(1.0) == 1.0 => Activation::Silu,
            "Gelu" => match text(node, "approximate").unwrap_or("none") {
                "none" => Activation::Gelu,
                "tanh" => Activation::GeluTanh,
                other => {
                    return Err(format!(
                        "expected approximate 'none' or 'tanh', found '{}'",
                        printable(other)
                    ));
                }
            },
            _ => return Ok(None),
        };
        known(node, &["alpha", "approximate"])?;
        match &node.input[..] {
            [x] => Ok(Some((activation, x, vec![i]))),
            _ => Err("expected one input, found another number".into()),
        }
    }

    /// Finds the activations that are several nodes, the largest first.
    pub(super) fn find_trees(&mut self) {
        let graph = self.graph;
        for (i, node) in graph.node.iter().enumerate().rev() {
            if self.done.contains(&i) || !["Mul", "Div"].contains(&node.op_type.as_str()) {
                continue;
            }
            for (activation, tree) in trees() {
                let mut found = Match {
                    reader: self,
                    x: None,
                    nodes: Vec::new(),
                };
                let Some(output) = node.output.first() else {
                    continue;
                };
                if !found.tree(output, &tree) {
                    continue;
                }
                let Match {
                    x: Some(x), nodes, ..
                } = found
                else {
                    continue;
                };
                // What lies within is nobody else's.
                let inner = || nodes.iter().filter(|n| **n != i);
                let own = inner().all(|n| {
                    let takers = self.takers.get(graph.node[*n].output[0].as_str());
                    takers.is_some_and(|takers| takers.iter().all(|t| nodes.contains(t)))
                });
                if own {
                    self.done.extend(inner());
                    self.trees.insert(i, (activation, x, nodes));
                    break;
                }
            }
        }
    }
}

/// The activations of several nodes, as exporters write them.
fn trees() -> Vec<(Activation, Tree)> {
    use Tree::{Constant, X};
    let node = |op, inputs: [Tree; 2]| Tree::Node(op, inputs.into());
    let of = |op, input| Tree::Node(op, vec![input]);
    let half = |activation: Activation| match activation.tree() {
        // x/2 first.
        Some(Tree::Node(_, mut inputs)) => match inputs.swap_remove(0) {
            Tree::Node(op, mut inputs) => {
                let sum = inputs.swap_remove(1);
                (activation, node(op, [node("Mul", [X, Constant(0.5)]), sum]))
            }
            other => (activation, other),
        },
        _ => (activation, X),
    };
    let written = [Activation::Gelu, Activation::GeluTanh, Activation::Silu];
    let mut trees: Vec<(Activation, Tree)> = written
        .into_iter()
        .filter_map(|activation| Some((activation, activation.tree()?)))
        .collect();
    trees.extend([half(Activation::Gelu), half(Activation::GeluTanh)]);
    // The cube as a product.
    let cube = node("Mul", [X, node("Mul", [X, X])]);
    let sum = node("Add", [X, node("Mul", [cube, Constant(0.044715)])]);
    let tanh = of("Tanh", node("Mul", [sum, Constant(0.797_884_6)]));
    let product = node("Mul", [X, node("Add", [tanh, Constant(1.0)])]);
    trees.push((Activation::GeluTanh, node("Mul", [product, Constant(0.5)])));
    trees.push((
        Activation::HardSwish,
        node("Mul", [X, of("HardSigmoid", X)]),
    ));
    let clip = Tree::Node(
        "Clip",
        vec![
            node("Add", [X, Constant(3.0)]),
            Constant(0.0),
            Constant(6.0),
        ],
    );
    trees.push((
        Activation::HardSwish,
        node("Div", [node("Mul", [X, clip.clone()]), Constant(6.0)]),
    ));
    trees.push((
        Activation::HardSwish,
        node("Mul", [X, node("Div", [clip, Constant(6.0)])]),
    ));
    trees
}

/// A comparison of a part of the graph with a tree.
struct Match<'r, 'a> {
    reader: &'r Reader<'a>,
    x: Option<&'a str>,
    nodes: Vec<usize>,
}

impl<'a> Match<'_, 'a> {
    fn tree(&mut self, name: &'a str, tree: &Tree) -> bool {
        match tree {
            Tree::X => {
                let free = !self.reader.constants.contains_key(name);
                free && *self.x.get_or_insert(name) == name
            }
            Tree::Constant(expected) => {
                let found = self.reader.constants.get(name).and_then(Constant::scalar);
                found.is_some_and(|found| (found - expected).abs() <= 1e-6 * expected.abs())
            }
            Tree::Node(op, inputs) => {
                let Some(&i) = self.reader.makers.get(name) else {
                    return false;
                };
                let node = &self.reader.graph.node[i];
                let sixth =
                    |key| float(node, key).is_none_or(|alpha| (alpha - 1.0 / 6.0).abs() < 1e-6);
                if node.op_type != *op
                    || node.input.len() != inputs.len()
                    // The default is 0.2.
                    || (*op == "HardSigmoid" && (float(node, "alpha").is_none() || !sixth("alpha")))
                    || float(node, "beta").is_some_and(|beta| beta != 0.5)
                {
                    return false;
                }
                let before = (self.x, self.nodes.len());
                let mut orders = vec![[0, 1]];
                if ["Add", "Mul"].contains(op) {
                    orders.push([1, 0]);
                }
                for order in orders {
                    (self.x, _) = before;
                    self.nodes.truncate(before.1);
                    let places = match inputs.len() {
                        2 => order.to_vec(),
                        n => (0..n).collect(),
                    };
                    let mut pairs = places.iter().zip(inputs);
                    if pairs.all(|(at, input)| self.tree(&node.input[*at], input)) {
                        self.nodes.push(i);
                        return true;
                    }
                }
                false
            }
        }
    }
}
