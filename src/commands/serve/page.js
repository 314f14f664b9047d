'use strict';

const $ = id => document.getElementById(id);
const pad = $('pad'), video = $('video'), picture = $('picture');
let run = null;

// What is asked about: the pad, or bytes of a picture.
let source = null, changed = false, asking = false, timer = 0;

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

// From hexadecimal digits.
function bytesOf(hex) {
  const bytes = new Uint8Array(hex.length / 2);
  for (let i = 0; i < bytes.length; i++) bytes[i] = parseInt(hex.substr(2 * i, 2), 16);
  return bytes;
}

const percent = share => `${(100 * share).toFixed(1)} %`;
const counted = n => n.toLocaleString('en');

async function fetched(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error('wgrad serve does not answer; start it again and reload this page');
  }
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

function problem(text) {
  $('problem').textContent = text;
  $('problem').hidden = !text;
}

// ---- Asking ----

// Soon, and once for all that changes until then.
function ask() {
  changed = true;
  clearTimeout(timer);
  timer = setTimeout(send, 40);
}

async function send() {
  if (asking || !changed || !source) return;
  asking = true;
  changed = false;
  try {
    const asked = source;
    const body = await source();
    const answer = body && await fetched(`api/predict?invert=${$('invert').value}`, { method: 'POST', body });
    // What was cleared meanwhile has no answer.
    if (answer && source === asked) show(answer);
    problem('');
  } catch (error) {
    if (source) forget();
    problem(error.message);
  }
  asking = false;
  if (changed) send();
}

function forget() {
  $('said').textContent = 'Nothing to see yet';
  $('how').textContent = '';
  for (const row of $('bars').children) {
    row.classList.remove('best');
    row.querySelector('.bar').style.width = '0';
    row.querySelector('.share').textContent = '';
  }
  $('seen').getContext('2d').clearRect(0, 0, $('seen').width, $('seen').height);
  $('layers').replaceChildren();
  $('no-layers').hidden = false;
}

// ---- The answer ----

const MOST_BARS = 12;

function show({ shares, inverted, centred, seen, layers, epoch, milliseconds }) {
  const names = run.class_names;
  const order = shares.map((_, k) => k).sort((a, b) => shares[b] - shares[a] || a - b);
  // Few classes stay in their order, so that bars do not jump.
  const shown = names.length > MOST_BARS ? order.slice(0, MOST_BARS) : names.map((_, k) => k);
  const rows = [...$('bars').children];
  shown.forEach((k, i) => {
    const share = Math.min(1, Math.max(0, shares[k]));
    rows[i].classList.toggle('best', k === order[0]);
    const name = rows[i].querySelector('.name');
    name.textContent = name.title = names[k];
    rows[i].querySelector('.bar').style.width = `${100 * share}%`;
    rows[i].querySelector('.share').textContent = percent(shares[k]);
  });
  // A name that is written from right to left turns nothing but itself.
  $('said').replaceChildren(element('bdi', { textContent: names[order[0]] }), `, ${percent(shares[order[0]])}`);
  const changes = [inverted && 'inverted', centred && 'cut out and centred'].filter(Boolean).join(', ');
  const weights = epoch === null ? '' : `weights of epoch ${epoch}, `;
  $('how').textContent = `${changes ? changes + '; ' : ''}${weights}${milliseconds.toFixed(0)} ms`;
  const { height, width, channels } = run.input;
  paint($('seen'), bytesOf(seen), height, width, channels);
  $('no-layers').hidden = true;
  showLayers(layers);
}

function paint(canvas, bytes, height, width, channels) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[channels * i + (channels === 3 ? c : 0)];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
}

// Channels side by side, a gap between them, as large as the page allows.
function showLayers(layers) {
  const host = $('layers');
  while (host.children.length > layers.length) host.lastChild.remove();
  layers.forEach((layer, i) => {
    let row = host.children[i];
    if (!row) {
      row = element('div', { className: 'layer' }, element('h3'), element('canvas'));
      host.append(row);
    }
    const { name, height, width, channels, shown, low, high } = layer;
    const flat = height * width === 1;
    const size = flat ? `${channels} values` : `${channels} channels of ${height}×${width}`;
    const part = shown < channels ? `, the first ${shown} shown` : '';
    row.firstChild.replaceChildren(name, element('span', {
      textContent: `${size}${part}, ${low.toFixed(2)} to ${high.toFixed(2)}`,
    }));
    const canvas = row.lastChild;
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', `Output of ${name}`);
    const room = Math.max(200, host.clientWidth), gap = flat ? 0 : 4;
    // Whole multiples of a pixel; single values stand in a strip.
    const tile = room < 500 ? 40 : 56;
    const scale = flat ? Math.min(24, Math.max(4, Math.floor(room / channels))) : Math.max(1, Math.round(tile / width));
    const [tileWidth, tileHeight] = flat ? [scale, 16] : [width * scale, height * scale];
    const columns = Math.max(1, Math.min(shown, Math.floor((room + gap) / (tileWidth + gap))));
    canvas.width = columns * (tileWidth + gap) - gap;
    canvas.height = Math.ceil(shown / columns) * (tileHeight + gap) - gap;
    const bytes = bytesOf(layer.values), pixels = height * width;
    const context = canvas.getContext('2d'), small = element('canvas', { width, height });
    context.imageSmoothingEnabled = false;
    for (let c = 0; c < shown; c++) {
      const image = new ImageData(width, height);
      for (let p = 0; p < pixels; p++) image.data.set(colour(bytes[c * pixels + p]), 4 * p);
      small.getContext('2d').putImageData(image, 0, 0);
      const x = (c % columns) * (tileWidth + gap), y = Math.floor(c / columns) * (tileHeight + gap);
      context.drawImage(small, x, y, tileWidth, tileHeight);
    }
  });
}

// From dark blue over green to yellow: a few points of matplotlib's viridis.
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function colour(byte) {
  const at = byte / 255 * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2), t = at - i;
  return [0, 1, 2].map(c => VIRIDIS[i][c] * (1 - t) + VIRIDIS[i + 1][c] * t).concat(255);
}

// ---- The pad ----

const ink = pad.getContext('2d');
const WIDTH = 22, STEP = 14;
let drawn = false, last = null;
const pen = { x: pad.width / 2, y: 60, down: false };

function clear() {
  stopCamera();
  ink.fillStyle = '#fff';
  ink.fillRect(0, 0, pad.width, pad.height);
  drawn = false;
  source = null;
  changed = false;
  picture.hidden = true;
  URL.revokeObjectURL(picture.src);
  picture.removeAttribute('src');
  pen.down = false;
  movePen();
  pad.hidden = !canDraw();
  $('empty').hidden = canDraw();
  problem('');
  forget();
}

const canDraw = () => run && run.input.channels === 1;

function line(from, to) {
  ink.strokeStyle = '#111';
  ink.lineWidth = WIDTH;
  ink.lineCap = ink.lineJoin = 'round';
  ink.beginPath();
  ink.moveTo(from.x, from.y);
  ink.lineTo(to.x, to.y);
  ink.stroke();
  drawn = true;
  source = padPicture;
  ask();
}

function padPicture() {
  return drawn ? new Promise(done => pad.toBlob(done, 'image/png')) : null;
}

function place(event) {
  const box = pad.getBoundingClientRect();
  return { x: (event.clientX - box.left) / box.width * pad.width, y: (event.clientY - box.top) / box.height * pad.height };
}

pad.addEventListener('pointerdown', event => {
  if (event.button !== 0) return;
  pad.setPointerCapture(event.pointerId);
  last = place(event);
  line(last, last);
});
pad.addEventListener('pointermove', event => {
  if (!last) return;
  // All of what a fast pointer did between two frames.
  const moves = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const move of moves.length ? moves : [event]) {
    const to = place(move);
    line(last, to);
    last = to;
  }
});
for (const end of ['pointerup', 'pointercancel']) pad.addEventListener(end, () => { last = null; });

function movePen() {
  const mark = $('pen');
  mark.hidden = pad.hidden || !pad.matches(':focus-visible');
  mark.classList.toggle('down', pen.down);
  mark.style.left = `${100 * pen.x / pad.width}%`;
  mark.style.top = `${100 * pen.y / pad.height}%`;
}
pad.addEventListener('focus', movePen);
pad.addEventListener('blur', () => { pen.down = false; movePen(); });
pad.addEventListener('keydown', event => {
  const step = event.shiftKey ? 3 * STEP : STEP;
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  if (moves[event.key]) {
    const [dx, dy] = moves[event.key], within = v => Math.min(pad.width - WIDTH / 2, Math.max(WIDTH / 2, v));
    const to = { x: within(pen.x + dx), y: within(pen.y + dy) };
    if (pen.down) line(pen, to);
    Object.assign(pen, to);
  } else if (event.key === ' ') {
    pen.down = !pen.down;
    if (pen.down) line(pen, pen);
  } else if (event.key === 'Delete' || event.key === 'Escape') {
    clear();
  } else {
    return;
  }
  event.preventDefault();
  movePen();
});

// ---- Pictures ----

function take(file) {
  if (!file) return;
  clear();
  picture.src = URL.createObjectURL(file);
  picture.hidden = false;
  pad.hidden = true;
  $('empty').hidden = true;
  source = () => file;
  ask();
}

// Of a format that the browser does not know; the network sees it all the same.
picture.addEventListener('error', () => {
  if (!picture.src) return;
  picture.hidden = true;
  $('empty').hidden = false;
});

$('clear').addEventListener('click', clear);
$('choose').addEventListener('click', () => $('file').click());
$('file').addEventListener('change', () => {
  take($('file').files[0]);
  $('file').value = '';
});
$('invert').addEventListener('change', ask);

document.addEventListener('dragover', event => {
  event.preventDefault();
  document.body.classList.add('dropping');
});
document.addEventListener('dragleave', event => {
  if (!event.relatedTarget) document.body.classList.remove('dropping');
});
document.addEventListener('drop', event => {
  event.preventDefault();
  document.body.classList.remove('dropping');
  take(event.dataTransfer.files[0]);
});
document.addEventListener('paste', event => take(event.clipboardData.files[0]));

// ---- The camera ----

let stream = null, watching = 0;

function stopCamera() {
  clearInterval(watching);
  if (stream) stream.getTracks().forEach(track => track.stop());
  stream = null;
  video.hidden = true;
  video.srcObject = null;
  $('camera').textContent = 'Camera';
  $('camera').setAttribute('aria-pressed', 'false');
}

// The middle of what the camera shows.
function frame() {
  const side = Math.min(video.videoWidth, video.videoHeight);
  if (!side) return null;
  const size = Math.min(side, 480);
  const still = element('canvas', { width: size, height: size });
  still.getContext('2d').drawImage(video, (video.videoWidth - side) / 2, (video.videoHeight - side) / 2, side, side,
    0, 0, size, size);
  return new Promise(done => still.toBlob(done, 'image/png'));
}

$('camera').addEventListener('click', async () => {
  if (stream) return clear();
  clear();
  try {
    // Only this machine itself, or a page by HTTPS, may ask for it.
    if (!navigator.mediaDevices) throw new Error('a browser lends the camera only to http://localhost or 127.0.0.1');
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
  } catch (error) {
    return problem(`No camera: ${error.message}`);
  }
  video.srcObject = stream;
  video.hidden = false;
  pad.hidden = true;
  $('empty').hidden = true;
  $('camera').textContent = 'Stop camera';
  $('camera').setAttribute('aria-pressed', 'true');
  await video.play();
  source = frame;
  watching = setInterval(ask, 250);
});

// ---- The training ----

const NS = 'http://www.w3.org/2000/svg';
function svg(kind, attributes, text) {
  const made = document.createElementNS(NS, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Round steps of 1, 2 or 5 times a power of ten.
function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(k => k * power).find(step => step >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function chart(title, series, epochs, asPercent) {
  const values = series.flatMap(({ points }) => points.map(([, y]) => y));
  const caption = element('figcaption', { textContent: title });
  if (!values.length) return element('figure', {}, caption, element('p', { className: 'quiet', textContent: 'Nothing measured yet' }));
  let low = asPercent ? Math.min(...values) : 0, high = asPercent ? 1 : Math.max(...values);
  if (high - low < 1e-6) low = Math.max(0, high - (asPercent ? 0.1 : 1));
  if (asPercent) low = Math.max(0, low - 0.05 * (high - low));
  if (high <= low) high = low + 1;
  const W = innerWidth < 760 ? 340 : 500, H = W === 500 ? 260 : 220, left = 46, right = 10, top = 8, bottom = 34;
  const x = v => left + v / epochs * (W - left - right), y = v => H - bottom - (v - low) / (high - low) * (H - top - bottom);
  const root = svg('svg', { viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': title });
  const vertical = ticks(low, high, 5), across = ticks(0, epochs, 6);
  for (const v of vertical.found) {
    root.append(svg('line', { class: 'grid', x1: left, x2: W - right, y1: y(v), y2: y(v) }));
    const label = asPercent ? `${(100 * v).toFixed(Math.max(0, vertical.digits - 2))} %` : v.toFixed(vertical.digits);
    root.append(svg('text', { x: left - 6, y: y(v) + 4, 'text-anchor': 'end' }, label));
  }
  // Parts of an epoch only where there is but one.
  const whole = epochs > 1;
  for (const v of across.found.filter(v => !whole || Number.isInteger(v))) {
    root.append(svg('line', { class: 'grid', x1: x(v), x2: x(v), y1: top, y2: H - bottom }));
    root.append(svg('text', { x: x(v), y: H - bottom + 15, 'text-anchor': 'middle' }, v.toFixed(whole ? 0 : across.digits)));
  }
  root.append(svg('text', { x: (left + W - right) / 2, y: H - 3, 'text-anchor': 'middle' }, 'epochs'));
  for (const { kind, points } of series) {
    if (!points.length) continue;
    const path = points.map(([px, py], i) => `${i ? 'L' : 'M'}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join('');
    root.append(svg('path', { class: kind, d: path }));
    const [px, py] = points[points.length - 1];
    if (kind !== 'steps') root.append(svg('circle', { class: kind, cx: x(px), cy: y(py), r: 3 }));
  }
  return element('figure', {}, caption, root);
}

let before = '';

async function watch() {
  let soon = 5000;
  try {
    const state = await fetched('api/metrics');
    if (state.training) soon = 1500;
    const now = JSON.stringify(state);
    if (now !== before) {
      before = now;
      showTraining(state);
    }
  } catch (error) {
    $('progress').textContent = error.message;
  }
  setTimeout(watch, document.hidden ? 10000 : soon);
}

function showTraining({ epochs, steps, planned, finished, training }) {
  const last = epochs[epochs.length - 1], step = steps[steps.length - 1];
  const state = training ? 'in progress' : finished >= planned ? 'finished' : 'not in progress';
  const parts = [`Training ${state}: ${finished} of ${planned} epochs`];
  if (training && step) parts.push(`now in epoch ${Math.min(planned, Math.floor(step.epoch) + 1)}, loss ${step.loss.toFixed(4)}`);
  if (last && last.test_accuracy !== null) parts.push(`test accuracy ${(100 * last.test_accuracy).toFixed(2)} %`);
  if (last && last.images_per_second) parts.push(`${counted(Math.round(last.images_per_second))} images/s`);
  $('progress').textContent = parts.join(' · ');
  const points = (records, at, key) => records.filter(r => typeof r[key] === 'number').map(r => [at(r), r[key]]);
  const series = what => [
    { kind: 'steps', points: points(steps, r => r.epoch, what) },
    { kind: 'train', points: points(epochs, r => r.epoch, `train_${what}`) },
    { kind: 'validation', points: points(epochs, r => r.epoch, `validation_${what}`) },
    { kind: 'test', points: points(epochs, r => r.epoch, `test_${what}`) },
  ];
  const loss = series('loss'), accuracy = series('accuracy');
  // As far as it has come: of a long training the beginning is worth a look, too.
  const span = Math.max(1, Math.ceil(Math.max(step ? step.epoch : 0, last ? last.epoch : 0)));
  const legend = element('div', { className: 'legend' });
  for (const [kind, name] of [['train', 'training'], ['validation', 'validation'], ['test', 'test']]) {
    const kinds = kind === 'train' ? ['train', 'steps'] : [kind];
    if (!loss.some(s => kinds.includes(s.kind) && s.points.length)) continue;
    legend.append(element('span', {}, element('i', { className: kind }), name));
  }
  $('charts').replaceChildren(chart('Loss', loss, span, false), chart('Accuracy', accuracy, span, true));
  $('charts').after(legend);
  for (const old of [...document.querySelectorAll('.legend')].slice(1)) old.remove();
}

// ---- Begin ----

async function begin() {
  try {
    run = await fetched('api/run');
  } catch (error) {
    return problem(error.message);
  }
  const { height, width, channels } = run.input;
  document.title = `${run.run}: wgrad`;
  $('run').textContent = run.run;
  $('facts').textContent = [
    `model ${run.model}`, `${counted(run.parameters)} parameters`, `${height}×${width}×${channels} images`,
    `${run.class_names.length} classes`, `${counted(run.training_images)} training images of ${run.data}`,
  ].join(' · ');
  $('version').textContent = `Version ${run.wgrad}.`;
  $('inverting').hidden = channels !== 1;
  if (!run.draws) {
    // Nothing is recognised by itself.
    $('invert').options[0].remove();
    $('invert').value = 'never';
  }
  $('keys').hidden = !canDraw();
  $('seen').height = height;
  $('seen').width = width;
  const bars = Math.min(run.class_names.length, MOST_BARS);
  for (let i = 0; i < bars; i++) {
    $('bars').append(element('div', { className: 'row' },
      element('span', { className: 'name', textContent: run.class_names.length > MOST_BARS ? '' : run.class_names[i] }),
      element('span', { className: 'track' }, element('div', { className: 'bar' })),
      element('span', { className: 'share' })));
  }
  clear();
  watch();
}
begin();
