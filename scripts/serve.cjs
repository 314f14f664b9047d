// node serve.cjs WGRAD RUN [FOLDER]: opens the page of `wgrad serve RUN` in Chromium, draws a 1 with the mouse, by
// touch and by keyboard, drops a picture of a 7, takes a camera, and reads the answers from the page. With
// FOLDER also leaves pictures of the page there, wide and narrow, light and dark.
const { spawn } = require('node:child_process');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const WebSocket = require('ws');

const [wgrad, run, folder] = process.argv.slice(2);
const sleep = ms => new Promise(done => setTimeout(done, ms));
const children = [];

// Starts a program and waits for what it prints.
function started(program, args, channel, expected) {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  children.push(child);
  return new Promise((done, failed) => {
    let said = '';
    child[channel].on('data', data => {
      said += data;
      const found = said.match(expected);
      if (found) done(found[1]);
    });
    child.on('error', failed);
    child.on('exit', code => failed(new Error(`${program} ended with ${code}: ${said}`)));
  });
}

// A page's end of the DevTools protocol.
async function connected(port) {
  const pages = await (await fetch(`http://127.0.0.1:${port}/json`)).json();
  const socket = new WebSocket(pages.find(page => page.type === 'page').webSocketDebuggerUrl, { maxPayload: 1 << 28 });
  await new Promise((done, failed) => socket.on('open', done).on('error', failed));
  const waiting = new Map(), complaints = [];
  let number = 0;
  socket.on('message', data => {
    const { id, result, error, method, params } = JSON.parse(data);
    if (id) {
      const { done, failed } = waiting.get(id);
      waiting.delete(id);
      error ? failed(new Error(error.message)) : done(result);
    } else if (method === 'Runtime.exceptionThrown') {
      complaints.push(params.exceptionDetails.exception?.description ?? params.exceptionDetails.text);
    } else if (method === 'Log.entryAdded' && params.entry.level === 'error') {
      complaints.push(params.entry.text);
    }
  });
  const send = (method, params = {}) => new Promise((done, failed) => {
    waiting.set(++number, { done, failed });
    socket.send(JSON.stringify({ id: number, method, params }));
  });
  return { send, complaints };
}

// A 7 in dark ink on light paper, 120×140 pixels, as a BMP file.
function seven() {
  const width = 120, height = 140, bytes = Buffer.alloc(54 + 3 * width * height);
  bytes.write('BM');
  [bytes.length, 0, 54, 40, width, height].forEach((value, i) => bytes.writeUInt32LE(value, 2 + 4 * i));
  bytes.writeUInt16LE(1, 26);
  bytes.writeUInt16LE(24, 28);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const bar = Math.abs(y - 36) < 6 && x > 28 && x < 92;
      const leg = y >= 36 && y < 116 && Math.abs(x - (86 - 0.45 * (y - 36))) < 6;
      // Rows are stored from the bottom.
      bytes.fill(bar || leg ? 40 : 225, 54 + 3 * ((height - 1 - y) * width + x), 57 + 3 * ((height - 1 - y) * width + x));
    }
  }
  return bytes;
}

async function main() {
  const address = await started(wgrad, ['serve', run, '--port', '0'], 'stdout', /(http:\/\/\S+)/);
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'wgrad-serve-'));
  const flags = ['--headless=new', '--disable-gpu', '--no-first-run', `--user-data-dir=${profile}`,
    '--remote-debugging-port=0', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'];
  if (process.getuid() === 0) flags.push('--no-sandbox');
  const port = await started('chromium', [...flags, 'about:blank'], 'stderr', /ws:\/\/127\.0\.0\.1:(\d+)/);
  const { send, complaints } = await connected(port);
  for (const domain of ['Page', 'Runtime', 'Log', 'DOM']) await send(`${domain}.enable`);

  const evaluate = async expression => {
    const { result, exceptionDetails } = await send('Runtime.evaluate', { expression, awaitPromise: true, returnByValue: true });
    if (exceptionDetails) throw new Error(`${expression}: ${exceptionDetails.exception.description}`);
    return result.value;
  };
  const until = async (what, expression) => {
    const end = Date.now() + 60000;
    for (;;) {
      const value = await evaluate(expression);
      if (value) return value;
      if (Date.now() > end) throw new Error(`${what}: ${expression} did not come true; the page says: ${await evaluate('document.body.innerText')}`);
      await sleep(50);
    }
  };
  const size = (width, height, mobile = false) =>
    send('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: 1, mobile });
  const said = () => evaluate("document.getElementById('said').textContent");
  const nothing = 'Nothing to see yet';
  let passed = 0;
  const answered = async (how, expected) => {
    await until(how, `document.getElementById('said').textContent.startsWith(${JSON.stringify(expected + ', ')})`);
    const layers = await evaluate("document.querySelectorAll('#layers .layer canvas').length");
    if (layers < 3) throw new Error(`${how}: expected every layer, found ${layers}`);
    console.log(`${how}: ${await said()}`);
    passed++;
  };
  const clear = async () => {
    await evaluate("document.getElementById('clear').click()");
    await until('clear', `document.getElementById('said').textContent === ${JSON.stringify(nothing)}`);
  };
  // Where a share of the pad's width and height is on the page.
  const at = async (x, y) => {
    const box = await evaluate(`(() => { const pad = document.getElementById('pad'); pad.scrollIntoView({ block: 'center' });
      const { left, top, width, height } = pad.getBoundingClientRect(); return { left, top, width, height }; })()`);
    return { x: box.left + x * box.width, y: box.top + y * box.height };
  };
  const one = [[0.5, 0.2], [0.5, 0.35], [0.49, 0.5], [0.49, 0.65], [0.48, 0.8]];

  await size(1280, 1000);
  await send('Page.navigate', { url: address });
  await until('the page', "!document.getElementById('pad')?.hidden && document.querySelectorAll('#charts svg').length === 2");

  const points = [];
  for (const [x, y] of one) points.push(await at(x, y));
  const mouse = (type, point) => send('Input.dispatchMouseEvent', { type, ...point, button: 'left', buttons: 1, clickCount: 1 });
  await mouse('mousePressed', points[0]);
  for (const point of points.slice(1)) await mouse('mouseMoved', point);
  // While it is being drawn.
  await until('live', `document.getElementById('said').textContent !== ${JSON.stringify(nothing)}`);
  await mouse('mouseReleased', points[points.length - 1]);
  await answered('mouse', '1');
  if (folder) await pictures(folder, send, size, evaluate);
  await clear();

  await size(400, 800, true);
  await send('Emulation.setTouchEmulationEnabled', { enabled: true });
  const touched = [];
  for (const [x, y] of one) touched.push(await at(x, y));
  await send('Input.dispatchTouchEvent', { type: 'touchStart', touchPoints: [touched[0]] });
  for (const point of touched.slice(1)) await send('Input.dispatchTouchEvent', { type: 'touchMove', touchPoints: [point] });
  await send('Input.dispatchTouchEvent', { type: 'touchEnd', touchPoints: [] });
  await answered('touch', '1');
  await send('Emulation.setTouchEmulationEnabled', { enabled: false });
  await size(1280, 1000);
  await clear();

  const codes = { Tab: 9, Space: 32, ArrowDown: 40, Delete: 46 };
  const press = async (key, code, text) => {
    const event = { key, code, windowsVirtualKeyCode: codes[code] };
    await send('Input.dispatchKeyEvent', { type: text ? 'keyDown' : 'rawKeyDown', text, ...event });
    await send('Input.dispatchKeyEvent', { type: 'keyUp', ...event });
  };
  // By Tab alone.
  await evaluate('document.activeElement.blur()');
  for (let i = 0; i < 12 && await evaluate("document.activeElement.id !== 'pad'"); i++) await press('Tab', 'Tab');
  if (await evaluate("document.getElementById('pen').hidden")) throw new Error('keyboard: the pen is not shown');
  await press(' ', 'Space', ' ');
  for (let i = 0; i < 12; i++) await press('ArrowDown', 'ArrowDown');
  await press(' ', 'Space', ' ');
  await answered('keyboard', '1');
  await press('Delete', 'Delete');
  await until('Delete', `document.getElementById('said').textContent === ${JSON.stringify(nothing)}`);

  const dropped = path.join(profile, 'seven.bmp');
  fs.writeFileSync(dropped, seven());
  const data = { items: [], files: [dropped], dragOperationsMask: 1 };
  const middle = { x: 640, y: 400 };
  for (const type of ['dragEnter', 'dragOver', 'drop']) await send('Input.dispatchDragEvent', { type, ...middle, data });
  await answered('drop', '7');
  await until('preview', "document.getElementById('picture').naturalWidth > 0");
  await clear();

  await evaluate("document.getElementById('camera').click()");
  await until('camera', `document.getElementById('said').textContent !== ${JSON.stringify(nothing)}`);
  console.log(`camera: ${await said()}`);
  await evaluate("document.getElementById('camera').click()");
  await until('camera off', "document.getElementById('video').hidden");
  await clear();

  // What is no picture is said.
  await evaluate("take(new File(['no picture'], 'a.png'))");
  await until('a bad picture', "document.getElementById('problem').textContent.includes('cannot be read')");
  const expected = complaints.filter(text => !text.includes('422'));
  if (expected.length) throw new Error(`the page complains: ${expected.join('; ')}`);
  if (passed !== 4) throw new Error(`expected 4 answers, found ${passed}`);
  console.log('serve: a digit by mouse, touch and keyboard, a dropped picture and the camera are answered');
}

async function pictures(folder, send, size, evaluate) {
  fs.mkdirSync(folder, { recursive: true });
  for (const width of [1280, 400]) {
    for (const scheme of ['light', 'dark']) {
      await send('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: scheme }] });
      await size(width, 900);
      await sleep(300);
      await evaluate("document.getElementById('invert').dispatchEvent(new Event('change'))");
      await sleep(700);
      const height = await evaluate('document.documentElement.scrollHeight');
      const wide = await evaluate('document.documentElement.scrollWidth');
      if (wide > width) throw new Error(`the page is ${wide} pixels wide on a screen of ${width}`);
      await size(width, height);
      await sleep(300);
      const { data } = await send('Page.captureScreenshot', { format: 'png' });
      fs.writeFileSync(path.join(folder, `serve-${width}-${scheme}.png`), Buffer.from(data, 'base64'));
    }
  }
  await size(1280, 1000);
}

main().then(() => 0, error => {
  console.error(error.message);
  return 1;
}).then(code => {
  for (const child of children) child.kill();
  process.exit(code);
});
