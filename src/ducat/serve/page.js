"use strict";

const ROWS = 10; // classes shown
const element = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
let about = null;
let image = null; // the chosen file
let request = 0; // number of the latest one: the answers of earlier ones are dropped
let stop = new AbortController(); // ends the latest one, and with it the attack

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function bar(real, dummy) {
  const parts = [["real", real], ["dummy", dummy]].map(([name, share]) => {
    const part = make("span", { className: name });
    part.style.width = percent(share).replace(" ", "");
    return part;
  });
  return make("div", { className: "bar" }, ...parts);
}

function outcome(seen) {
  if (seen.accepted === null) return seen.label;
  return seen.accepted ? `${seen.label}, accepted` : `${seen.label}?, flagged`;
}

function show(answer) {
  for (const kind of ["benign", "adversarial"]) {
    element(`${kind}-image`).src = answer[kind].image;
    element(`${kind}-label`).textContent = outcome(answer[kind]);
    element(`${kind}-label`).classList.toggle("flagged", answer[kind].accepted === false);
  }
  element("perturbation").src = answer.perturbation;
  element("distance").textContent = answer.distance.toFixed(4);
  const whole = (seen, c) => seen.real[c] + seen.dummy[c];
  const order = about.classes.map((_, c) => c);
  const strength = (c) => Math.max(whole(answer.benign, c), whole(answer.adversarial, c));
  if (order.length > ROWS) order.sort((a, b) => strength(b) - strength(a)).splice(ROWS);
  const rows = order.map((c) => {
    const cells = ["benign", "adversarial"].map((kind) => [answer[kind].real[c], answer[kind].dummy[c]]);
    const numbers = cells.map(([real, dummy]) => about.dummies ? `${percent(real)} + ${percent(dummy)}` : percent(real));
    return make("tr", {},
      make("th", { scope: "row", textContent: about.classes[c] }),
      make("td", { className: "probability" }, ...cells.map((pair) => bar(...pair))),
      ...numbers.map((text) => make("td", { className: "number", textContent: text })));
  });
  element("bars").replaceChildren(...rows);
  element("result").hidden = false;
  const flagged = answer.adversarial.accepted === false ? " The image is flagged: its class is only a hint." : "";
  const undone = answer.undone
    ? ` It did reach another output, the dummy class of ${answer.benign.label}, and recovery undoes that.` : "";
  say((answer.fooled
    ? `The attack ${flagged ? "changes the class" : "succeeds"}: ${answer.benign.label} has become ${answer.adversarial.label}.`
    : `The attack fails: the image is still ${answer.benign.label}.`) + undone + flagged);
  element("next").hidden = !about.dummies;
  element("next").textContent = element("knows").checked
    ? "Attack without knowing of recovery" : "Now attack knowing of recovery";
}

async function attack() {
  element("eps-value").textContent = Number(element("eps").value).toFixed(4);
  if (image === null) return;
  const mine = ++request;
  stop.abort();
  stop = new AbortController();
  say("Attacking.");
  const ticker = setInterval(async () => {
    try {
      const { waiting } = await (await fetch("/line")).json();
      if (mine === request && waiting > 0) say(`Attacking: requests in line: ${waiting}.`);
    } catch { /* The answer to the attack says what is the matter. */ }
  }, 2000);
  const query = new URLSearchParams({
    eps: element("eps").value,
    attack: element("attack").value,
    knows_recovery: element("knows").checked,
  });
  try {
    const response = await fetch(`/attack?${query}`, {
      method: "POST", body: image, headers: { "Content-Type": image.type }, signal: stop.signal,
    });
    const answer = await response.json();
    if (mine !== request) return;
    if (response.ok) show(answer); else say(answer.error, true);
  } catch {
    if (mine === request) say("The server does not answer.", true);
  } finally {
    clearInterval(ticker);
  }
}

function choose(file, button = null) {
  for (const other of element("examples").children) other.setAttribute("aria-pressed", other === button);
  if (file.size > about.limit) {
    say(`The file is larger than ${about.limit / 2 ** 20} MiB.`, true);
    return;
  }
  image = file;
  attack();
}

function blob(uri) {
  const bytes = Uint8Array.from(atob(uri.split(",")[1]), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

async function start() {
  about = await (await fetch("/about")).json();
  element("run").textContent = about.run;
  element("norm").textContent = about.norm;
  element("attack").append(...about.attacks.map((name) => make("option", { value: name, textContent: name })));
  Object.assign(element("eps"), { max: 3 * about.eps, step: about.eps / 20, value: about.eps });
  element("eps-value").textContent = about.eps.toFixed(4);
  element("refusal").hidden = about.threshold === null;
  if (about.threshold !== null) {
    element("refusal").textContent = `Predictions whose ${about.signal} is below ${about.threshold.toFixed(2)} (log-odds) `
      + "are flagged: the class is then only a hint. These attacks seek a wrong class, not one that is accepted.";
  }
  element("knowledge").hidden = !about.dummies;
  element("examples-are").textContent = `Examples: ${about.examples_are}, each with its class.`;
  element("examples").append(...about.examples.map((uri, number) => {
    const label = about.labels[number];
    const name = label === undefined ? `Example ${number + 1}` : `Example ${number + 1}, class ${label}`;
    const picture = make("img", { src: uri, alt: name });
    const button = make("button", { type: "button", title: name }, picture);
    if (label !== undefined) button.append(make("span", { textContent: label, ariaHidden: "true" }));
    button.addEventListener("click", () => choose(blob(uri), button));
    return button;
  }));
  element("next").addEventListener("click", () => {
    element("knows").checked = !element("knows").checked;
    attack();
  });
  for (const id of ["attack", "eps", "knows"]) element(id).addEventListener("change", attack);
  element("eps").addEventListener("input", () => {
    element("eps-value").textContent = Number(element("eps").value).toFixed(4);
  });
  element("file").addEventListener("change", (event) => {
    if (event.target.files.length) choose(event.target.files[0]);
  });
  const drop = element("drop");
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", over);
      if (name === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
    });
  }
  if (about.attacks.includes("pgd-20")) element("attack").value = "pgd-20";
  element("examples").children[about.opening].click();
}

start();
