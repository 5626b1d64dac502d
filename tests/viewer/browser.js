// Opens the viewer's page, uses it as a person does, and prints what came of it.
const fs = require('fs');
const path = require('path');
const puppeteer = require('puppeteer-core');

const ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader'];
const VIEWS = [
  { name: 'laptop, light', width: 1280, scheme: 'light' },
  { name: 'phone, dark', width: 390, scheme: 'dark' },
];
const MINUTES = 60000;

(async () => {
  const [executablePath, url, folder, what] = process.argv.slice(2);
  const wanted = JSON.parse(what);
  const browser = await puppeteer.launch({ executablePath, args: ARGS, headless: true, protocolTimeout: 5 * MINUTES });
  const page = await browser.newPage();
  page.setDefaultTimeout(5 * MINUTES);
  const errors = [];
  const requests = [];
  page.on('console', (message) => message.type() === 'error' && errors.push(message.text()));
  page.on('pageerror', (error) => errors.push(String(error)));
  page.on('request', (request) => request.url().startsWith('data:') || request.url().startsWith(url) || requests.push(request.url()));
  page.on('dialog', (dialog) => dialog.accept());
  const text = (id) => page.$eval(`#${id}`, (one) => one.textContent);
  const click = (id) => page.$eval(`#${id}`, (one) => one.click());
  const until = (test, ...given) => page.waitForFunction(test, { timeout: 5 * MINUTES }, ...given);
  const drawn = () => new Promise((done) => setTimeout(done, 700));
  const picture = async (name) => {
    await drawn();
    return (await (await page.$('#canvas')).screenshot({ path: path.join(folder, `${name}.png`) })).toString();
  };
  const choose = (id, value) => page.select(`#${id}`, value);
  const open = async () => {
    await page.goto(url, { waitUntil: 'load' });
    await until(() => document.getElementById('canvas').dataset.ready === 'yes');
    await drawn();
  };

  const views = [];
  for (const { name, width, scheme } of VIEWS) {
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
    await open();
    // the page's policy lets no script in: this one comes through the browser's own door
    await page.evaluate(fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8'));
    const { violations } = await page.evaluate(() => axe.run());
    views.push({
      name,
      violations: violations.map(({ impact, id, nodes }) => ({ impact, id, example: nodes[0].html.slice(0, 200) })),
      wider_than_the_window: await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth + 1),
    });
    await page.screenshot({ path: path.join(folder, `${name.replace(', ', '-')}.png`), fullPage: true });
  }

  await page.setViewport({ width: 1280, height: 900 });
  await open();
  const found = { status: await text('status'), scores: await text('scores') };

  // each layer alone, by the keyboard
  await page.focus('#canvas');
  const names = await page.$$eval('#layers input', (all) => all.map((one) => one.id.replace('layer-', '')));
  const off = () => page.$$eval('#layers input', (all) => all.forEach((one) => one.checked && one.click()));
  await off();
  const without = await picture('without');
  found.seen = {};
  for (const name of names.filter((one) => one !== 'box')) {
    await page.keyboard.press(String(names.indexOf(name) + 1));
    await until((id) => document.getElementById(id).checked, `layer-${name}`);
    await until(() => !document.getElementById('status').textContent);
    found.seen[name] = (await picture(name)) !== without;
    await off();
  }
  found.back = (await picture('back')) === without;
  if (wanted.probability) {
    await choose('probability', wanted.probability);
    await until(() => document.getElementById('status').textContent.startsWith('Probability'));
    found.seen.probability = (await picture('probability')) !== without;
    await choose('probability', '');
    await drawn();
  }

  // zoom and slices
  await page.focus('#canvas');
  await page.keyboard.press('+');
  found.zoomed = (await picture('zoomed')) !== without;
  await page.keyboard.press('0');
  found.whole = (await picture('whole')) === without;
  const before = await text('at');
  await page.keyboard.press('ArrowUp');
  found.slices = [before, await text('at')];
  await page.keyboard.press('ArrowDown');

  const stage = await (await page.$('#canvas')).boundingBox();
  const middle = [stage.x + stage.width / 2, stage.y + stage.height / 2];
  const drag = async (dx, dy) => {
    await page.mouse.move(middle[0] - dx, middle[1] - dy);
    await page.mouse.down();
    await page.mouse.move(middle[0], middle[1], { steps: 4 });
    await page.mouse.move(middle[0] + dx, middle[1] + dy, { steps: 4 });
    await page.mouse.up();
  };
  if (wanted.box) {
    await click('drawbox');
    await drag(60, 60);
    await until(() => /box/.test(document.getElementById('scores').textContent) || document.querySelector('#status.bad'));
    found.box = await text('status');
    found.scored = await text('scores');
    found.corners = await page.$$eval('#corners input', (all) => all.map((one) => Number(one.value)));
    await picture('box');
    await off();
  }

  // a correction: one line, saved
  await choose('start', 'empty');
  await click('draw');
  await until(() => document.getElementById('draw').getAttribute('aria-pressed') === 'true');
  await page.$eval('#width', (one) => { one.value = 3; one.dispatchEvent(new Event('change')); });
  await drag(60, 0);
  await picture('drawing');
  found.can_save = !(await page.$eval('#save', (one) => one.disabled));
  if (found.can_save) {
    await click('save');
    await until(() => /Saved|E\d\d/.test(document.getElementById('status').textContent));
  }
  found.saved = await text('status');
  await page.screenshot({ path: path.join(folder, 'end.png'), fullPage: true });
  console.log(JSON.stringify({ views, errors, requests, ...found }));
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
