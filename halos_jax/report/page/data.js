"use strict";
// Data stands in the page compressed and in base64. It is text: nothing here turns it into markup.

function unpackBytes(name) {
  const text = document.getElementById("data-" + name).textContent;
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const packed = atob(text), bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index++) bytes[index] = packed.charCodeAt(index);
  return bytes;
}

async function unpack(name) {
  const stream = new Blob([unpackBytes(name)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const unpacked = new Map();

function unpackJson(name) {
  if (!unpacked.has(name)) unpacked.set(name, unpack(name).then(JSON.parse));
  return unpacked.get(name);
}

function hasData(name) {
  return document.getElementById("data-" + name) !== null;
}

// Make an element. What it says is set as text alone.
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function showNumber(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(1) : String(Number(value.toPrecision(3)));
}
